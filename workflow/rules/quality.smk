# Quality cells: the same pattern as speed cells, one job, one process, one file each, and a table of their own.


rule measure_quality:
    input:
        data=quality_inputs,
        # ancient: they measure nothing themselves
        script=ancient(script("measure_cell.py")),
        helpers=[ancient(script("gpu_token.py")), ancient(script("progress.py"))],
    output:
        "results/quality/{cell}.json",
    log:
        "results/logs/quality/{cell}.log",
    benchmark:
        "results/benchmarks/quality/{cell}.tsv"
    wildcard_constraints:
        cell="|".join(QUALITY) or "none",
    conda:
        "../../envs/cpu.yaml"
    threads: measuring_threads
    resources:
        gpu=1,
        runtime=lambda wildcards: int(QUALITY[wildcards.cell].timeout_s / 60) + 6,
    params:
        cell=lambda wildcards: json.dumps(
            QUALITY[wildcards.cell].to_dict(), sort_keys=True
        ),
        digest=source_digest(),
        command=QUALITY_COMMAND,
        plan="results/plan/{cell}.json",
    message:
        "Measuring {wildcards.cell}"
    shell:
        "exec python {input.script} --kind quality --cell {params.cell:q} --row {output}"
        " --plan {params.plan} --log {log} -- {params.command}"


rule quality_table:
    input:
        rows=quality_rows,
        plan=plan_of,
        script=script("quality_table.py"),
        shared=script("make_table.py"),
        schema=str(SCHEMAS / "quality.schema.yaml"),
    output:
        rows="{results}/quality.jsonl",
        table="{results}/quality.csv",
        status="{results}/quality-status.json",
    log:
        "{results}/logs/quality_table.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        plan=lambda wildcards, input: f"--plan {input.plan}" if input.plan else "",
    message:
        "Checking the quality rows"
    shell:
        "python {input.script} --sources {input.rows} {params.plan} --schema {input.schema}"
        " --rows {output.rows} --table {output.table} --status {output.status} 2> {log}"


rule plot_quality:
    input:
        rows="{results}/quality.jsonl",
        speed="{results}/rows.jsonl",
        script=script("plot_quality.py"),
        findings=script("quality_findings.py"),
        style=[script("plotting.py"), script("naming.py")],
    output:
        svg=report(
            "{results}/figures/quality.svg",
            caption="../report/quality.rst",
            category="Figures",
            labels={
                "figure": "quality",
                "shows": "KV bytes and speed against quality",
            },
        ),
        csv="{results}/figures/quality.csv",
    log:
        "{results}/logs/plot_quality.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing quality against KV bytes and throughput"
    shell:
        "python {input.script} --rows {input.rows} --speed {input.speed}"
        " --svg {output.svg} --csv {output.csv} 2> {log}"


# Quality alone: its cells, its table and its figure, from a config that also has a speed matrix.
rule quality:
    input:
        quality_of_this_run(),
        "results/quality.csv",
