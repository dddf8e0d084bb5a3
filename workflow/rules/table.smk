# All rows -> one table. `{results}` is `results`, or `results/recorded/NAME` for rows published in the repository:
# table, figures and report are made by the same rules in both.


rule write_plan:
    input:
        script=script("write_plan.py"),
    output:
        plan="results/plan.json",
    log:
        "results/logs/write_plan.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        config=json.dumps(config, sort_keys=True),
    message:
        "Writing what this config asks for to {output.plan}"
    shell:
        "python {input.script} --config {params.config:q} --output {output.plan} 2> {log}"


rule make_table:
    input:
        rows=rows_of,
        plan=plan_of,
        script=script("make_table.py"),
        schema=str(SCHEMAS / "row.schema.yaml"),
    output:
        rows="{results}/rows.jsonl",
        table="{results}/table.csv",
        status="{results}/status.json",
    log:
        "{results}/logs/make_table.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        source=lambda wildcards: (
            "results/cells"
            if wildcards.results == "results"
            else rows_of(wildcards)[0]
        ),
        plan=lambda wildcards, input: f"--plan {input.plan}" if input.plan else "",
    message:
        "Checking the rows and computing speed-ups and agreement"
    shell:
        "python {input.script} --source {params.source} {params.plan} --schema {input.schema}"
        " --rows {output.rows} --table {output.table} --status {output.status} 2> {log}"


rule gate:
    input:
        status=["results/status.json", "results/quality-status.json"],
        report="results/report.html",
        script=script("gate.py"),
    output:
        "results/gate.txt",
    log:
        "results/logs/gate.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Judging the run: every cell ok, or expected not to be?"
    shell:
        "python {input.script} --status {input.status} --output {output} 2>&1 | tee {log}"
