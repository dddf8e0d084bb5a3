# One cell: one job, one process, one file. A failure becomes a row (see workflow/scripts/measure_cell.py).
# No `retries`: they would hide that a measurement is flaky.


def model_files(wildcards):
    """What a cell reads: the model the workflow makes, or a folder that has to be there already."""
    path = CELLS[wildcards.cell].model_path
    if path is None:
        return []
    if path == str(Path(rules.get_smollm2.output.weights).parent):
        return [rules.get_smollm2.output.weights]
    return [f"{path}/config.json"]


rule measure_cell:
    input:
        model=model_files,
    output:
        "results/cells/{cell}.json",
    log:
        "results/logs/cells/{cell}.log",
    benchmark:
        "results/benchmarks/cells/{cell}.tsv"
    wildcard_constraints:
        cell="|".join(CELLS),
    conda:
        "../../envs/cpu.yaml"
    threads: 64  # scaled down to all there are: nothing else runs beside a measurement
    resources:
        gpu=1,
    params:
        cell=lambda wildcards: json.dumps(
            CELLS[wildcards.cell].to_dict(), sort_keys=True
        ),
        digest=source_digest(),  # edited engine: measure again; edited plot: do not
        command="fastcache cell",
    message:
        "Measuring {wildcards.cell}"
    shell:
        "exec python {SCRIPTS}/measure_cell.py --cell {params.cell:q} --row {output}"
        " --plan results/plan/{wildcards.cell}.json --log {log} -- {params.command}"
