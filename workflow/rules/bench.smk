# One cell: one job, one process, one file. A failure becomes a row (see workflow/scripts/measure_cell.py).
# No `retries`: they would hide that a measurement is flaky.


rule measure_cell:
    input:
        model=model_files,
        proof=greenctx_proof,
        script=ancient(script("measure_cell.py")),  # ancient: it measures nothing itself
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
        command=CELL_COMMAND,
        plan="results/plan/{cell}.json",
    message:
        "Measuring {wildcards.cell}"
    shell:
        "exec python {input.script} --cell {params.cell:q} --row {output}"
        " --plan {params.plan} --log {log} -- {params.command}"
