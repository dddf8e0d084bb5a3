from snakemake.utils import min_version

min_version("9.19")


# A config is whole: one given on the command line replaces the default, since merging would mix two matrices.
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/environment.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/bench.smk"
include: "workflow/rules/quality.smk"
include: "workflow/rules/table.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/serving.smk"
include: "workflow/rules/training.smk"


# Seconds each: on a cluster they run where Snakemake does.
localrules:
    quality_table,
    plot_quality,
    serving_table,
    serving_gate,
    render_serving,
    plot_throughput,
    plot_latency,
    plot_kv_memory,
    plot_agreement,
    plot_timeline,
    plot_decisions,
    plot_sm_ratio,
    plot_pools,
    render_report,
    plot_serving,
    write_plan,
    make_table,
    gate,


# The report first, the verdict last: a failed cell never keeps a run from showing what it has.
rule all:
    default_target: True
    input:
        rows_of_this_run(),
        quality_of_this_run(),
        ["results/report.html", "results/gate.txt"] if CELLS else [],
        serving_rows_of_this_run(),
        ["results/serving.html", "results/serving-gate.txt"] if SERVING else [],


# A run that was killed cannot clean up: the next one knows it by this (workflow/scripts/stale_lock.py).
onstart:
    stale_lock.remember()
    logger.info(f"Plan: {progress.announce(ESTIMATES, QUALITY, GPUS)}.")


onsuccess:
    stale_lock.forget()


onerror:
    stale_lock.forget()
