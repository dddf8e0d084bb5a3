# The page. Its text, captions, style and script are in report/, and inputs like any other.


rule render_report:
    input:
        rows="{results}/rows.jsonl",
        status="{results}/status.json",
        plan=plan_of,
        proof=proof_of,
        quality="{results}/quality.jsonl",
        quality_figure=multiext("{results}/figures/quality", ".svg", ".csv"),
        figures=expand(
            "{{results}}/figures/{figure}.{kind}", figure=FIGURES, kind=["svg", "csv"]
        ),
        script=script("render_report.py"),
        findings=[
            script(f"{name}.py")
            for name in (
                "findings",
                "deciding",
                "naming",
                "discussion",
                "reproduction",
                "quality_findings",
            )
        ],
        templates=[str(path) for path in sorted((BASE / "report").rglob("*.*"))],
    output:
        report(
            "{results}/report.html",
            caption="../report/page.rst",
            category="Report",
            labels={"figure": "the page", "shows": "everything"},
        ),
    log:
        "{results}/logs/render_report.log",
    conda:
        "../../envs/cpu.yaml"
    params:
        plan=lambda wildcards, input: f"--plan {input.plan}" if input.plan else "",
        proof=lambda wildcards, input: (
            f"--greenctx {input.proof}" if input.proof else ""
        ),
        templates=lambda wildcards, input: os.path.commonpath(input.templates),
    message:
        "Writing {output}"
    shell:
        "python {input.script} --rows {input.rows} --status {input.status} {params.plan} {params.proof}"
        " --quality {input.quality} --history {wildcards.results}/history.jsonl --figures {wildcards.results}/figures --templates {params.templates} --output {output} 2> {log}"


rule report:
    input:
        rows_of_this_run(),
        quality_of_this_run(),
        "results/report.html",


rule recorded:
    input:
        recorded_reports,
