# Engines under open-loop load: one job per engine, which goes through all its request rates and leaves a row for each.


rule measure_serving:
    input:
        model=serving_model_files,
        # ancient: they measure nothing themselves
        script=ancient(script("measure_serving.py")),
        waiting=ancient(script("measure_cell.py")),
    output:
        "results/serving/{serving_cell}.json",
    log:
        "results/logs/serving/{serving_cell}.log",
    benchmark:
        "results/benchmarks/serving/{serving_cell}.tsv"
    wildcard_constraints:
        serving_cell="|".join(SERVING),
    conda:
        "../../envs/cpu.yaml"
    threads: 64  # scaled down to all there are: nothing else runs beside a measurement
    resources:
        gpu=GPUS,
        runtime=lambda wildcards: int(SERVING[wildcards.serving_cell].timeout_s / 60)
        + 6,
    params:
        cell=lambda wildcards: json.dumps(
            SERVING[wildcards.serving_cell].to_dict(), sort_keys=True
        ),
        digest=source_digest(),  # edited engine: measure again; edited plot: do not
        command=SERVING_COMMAND,
        plan="results/plan/{serving_cell}.json",
    message:
        "Serving under load: {wildcards.serving_cell}"
    shell:
        "exec python {input.script} --cell {params.cell:q} --rows {output}"
        " --plan {params.plan} --log {log} -- {params.command}"


rule serving_table:
    input:
        rows=serving_rows_of,
        script=script("serving_table.py"),
        shared=script("make_table.py"),
        schema=str(SCHEMAS / "serving.schema.yaml"),
    output:
        rows="{results}/serving.jsonl",
        table="{results}/serving.csv",
        status="{results}/serving-status.json",
    log:
        "{results}/logs/serving_table.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        allowed=json.dumps(config.get("expected_failures") or []),
    message:
        "Checking the rows of serving under load"
    shell:
        "python {input.script} --sources {input.rows} --schema {input.schema}"
        " --expected-failures {params.allowed:q}"
        " --rows {output.rows} --table {output.table} --status {output.status} 2> {log}"


rule plot_serving:
    input:
        rows="{results}/serving.jsonl",
        script=script("plot_serving.py"),
        style=[script(f"{name}.py") for name in ("plotting", "naming", "serving_rows")],
    output:
        SERVING_FIGURES,
    log:
        "{results}/logs/plot_serving.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing latency, throughput, memory and stages against the request rate"
    shell:
        "python {input.script} --rows {input.rows} --folder {wildcards.results}/figures 2> {log}"


rule render_serving:
    input:
        rows="{results}/serving.jsonl",
        status="{results}/serving-status.json",
        figures=SERVING_FIGURES,
        script=script("render_serving.py"),
        findings=[
            script("serving_findings.py"),
            script("serving_reasons.py"),
            script("serving_rows.py"),
            script("serving_overview.py"),
            script("render_report.py"),
        ],
        templates=[str(path) for path in sorted((BASE / "report").rglob("*.*"))],
    output:
        report(
            "{results}/serving.html",
            caption="../report/serving.rst",
            category="Report",
            labels={"figure": "serving under load", "shows": "everything"},
        ),
    log:
        "{results}/logs/render_serving.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        title=lambda wildcards: (config.get("report") or {}).get(
            "title", "Serving under load"
        ),
        templates=lambda wildcards, input: os.path.commonpath(input.templates),
    message:
        "Writing {output}"
    shell:
        "python {input.script} --rows {input.rows} --status {input.status} --title {params.title:q}"
        " --figures {wildcards.results}/figures --templates {params.templates} --output {output} 2> {log}"


rule serving_gate:
    input:
        status="results/serving-status.json",
        report="results/serving.html",
        script=script("gate.py"),
    output:
        "results/serving-gate.txt",
    log:
        "results/logs/serving_gate.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Judging the run: every rate ok, or expected not to be?"
    shell:
        "python {input.script} --status {input.status} --output {output} 2>&1 | tee {log}"
