# One rule per figure: an SVG, and the CSV of exactly the numbers it shows. The scripts are inputs, so that
# editing one redraws its figure and the report, and measures nothing.


rule plot_throughput:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_throughput.py"),
        style=script("plotting.py"),
    output:
        svg=report(
            "{results}/figures/throughput.svg",
            caption="../report/throughput.rst",
            category="Figures",
            labels={"figure": "throughput", "shows": "tokens per second"},
        ),
        csv="{results}/figures/throughput.csv",
    log:
        "{results}/logs/plot_throughput.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing throughput by variant and batch"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule plot_latency:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_latency.py"),
        style=script("plotting.py"),
    output:
        svg=report(
            "{results}/figures/latency.svg",
            caption="../report/latency.rst",
            category="Figures",
            labels={
                "figure": "latency",
                "shows": "time to first token, time per output token",
            },
        ),
        csv="{results}/figures/latency.csv",
    log:
        "{results}/logs/plot_latency.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing TTFT and TPOT"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule plot_kv_memory:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_kv_memory.py"),
        style=script("plotting.py"),
    output:
        svg=report(
            "{results}/figures/kv_memory.svg",
            caption="../report/kv_memory.rst",
            category="Figures",
            labels={"figure": "kv_memory", "shows": "KV entries and bytes"},
        ),
        csv="{results}/figures/kv_memory.csv",
    log:
        "{results}/logs/plot_kv_memory.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing KV memory before and after"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule plot_agreement:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_agreement.py"),
        style=script("plotting.py"),
    output:
        svg=report(
            "{results}/figures/agreement.svg",
            caption="../report/agreement.rst",
            category="Figures",
            labels={"figure": "agreement", "shows": "equal output tokens"},
        ),
        csv="{results}/figures/agreement.csv",
    log:
        "{results}/logs/plot_agreement.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing agreement with the uncompressed output"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule figures:
    input:
        rows_of_this_run(),
        expand("results/figures/{figure}.{kind}", figure=FIGURES, kind=["svg", "csv"]),
