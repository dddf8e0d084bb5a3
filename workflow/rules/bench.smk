# One cell: one job, one process, one file. A failure becomes a row (see workflow/scripts/measure_cell.py).
# No `retries`: they would hide that a measurement is flaky.


rule measure_cell:
    input:
        model=model_files,
        proof=greenctx_proof,
        # ancient: they measure nothing themselves
        script=ancient(script("measure_cell.py")),
        helpers=[
            ancient(script(f"{name}.py"))
            for name in ("gpu_token", "progress", "reproduction")
        ],
    output:
        "results/cells/{cell}.json",
    log:
        "results/logs/cells/{cell}.log",
    benchmark:
        "results/benchmarks/cells/{cell}.tsv"
    wildcard_constraints:
        cell="|".join(CELLS),
    priority: longest_first
    conda:
        "../../envs/cpu.yaml"
    threads: measuring_threads
    resources:
        gpu=1,
        runtime=minutes_of_cell,
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
