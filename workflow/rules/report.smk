# The page. Its text, captions, style and script are in report/, and inputs like any other.


rule render_report:
    input:
        rows="{results}/rows.jsonl",
        status="{results}/status.json",
        plan=plan_of,
        figures=expand(
            "{{results}}/figures/{figure}.{kind}", figure=FIGURES, kind=["svg", "csv"]
        ),
        script=script("render_report.py"),
        findings=[script("findings.py"), script("discussion.py")],
        templates=[str(path) for path in sorted(REPORT.rglob("*.*"))],
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
    message:
        "Writing {output}"
    shell:
        "python {input.script} --rows {input.rows} --status {input.status} {params.plan}"
        " --figures {wildcards.results}/figures --templates {REPORT} --output {output} 2> {log}"


rule report:
    input:
        "results/report.html",


def recorded_report(wildcards):
    """The report of the published rows that the config names."""
    published = sorted(
        path.parent.name for path in Path("results/published").glob("*/rows.jsonl")
    )
    if config.get("recorded") not in published:
        raise ValueError(
            f"recorded is {config.get('recorded')!r}; published are: {', '.join(published) or 'none yet'}. "
            "Choose one with --config recorded=NAME."
        )
    return f"results/recorded/{config['recorded']}/report.html"


rule recorded:
    input:
        recorded_report,
