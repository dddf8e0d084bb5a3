# One rule per figure: an SVG, and the CSV of exactly the numbers it shows. The scripts are inputs, so that
# editing one redraws its figure and the report, and measures nothing.


rule plot_throughput:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_throughput.py"),
        style=[script(f"{name}.py") for name in ("plotting", "naming", "compact")],
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
        style=[script(f"{name}.py") for name in ("plotting", "naming", "compact")],
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
        style=[script(f"{name}.py") for name in ("plotting", "naming", "compact")],
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
        style=[script(f"{name}.py") for name in ("plotting", "naming", "compact")],
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


rule plot_timeline:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_timeline.py"),
        style=[script("plotting.py"), script("naming.py")],
    output:
        svg=report(
            "{results}/figures/timeline.svg",
            caption="../report/timeline.rst",
            category="Figures",
            labels={"figure": "timeline", "shows": "Steps and KV pages over time"},
        ),
        csv="{results}/figures/timeline.csv",
    log:
        "{results}/logs/plot_timeline.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing steps and KV pages over time"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule plot_decisions:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_decisions.py"),
        style=[script("plotting.py"), script("naming.py")],
    output:
        svg=report(
            "{results}/figures/decisions.svg",
            caption="../report/decisions.rst",
            category="Figures",
            labels={
                "figure": "decisions",
                "shows": "predicted and measured step times",
            },
        ),
        csv="{results}/figures/decisions.csv",
    log:
        "{results}/logs/plot_decisions.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing predicted and measured step times"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule plot_sm_ratio:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_sm_ratio.py"),
        style=[script("plotting.py"), script("naming.py")],
    output:
        svg=report(
            "{results}/figures/sm_ratio.svg",
            caption="../report/sm_ratio.rst",
            category="Figures",
            labels={"figure": "sm_ratio", "shows": "speed against compression's SMs"},
        ),
        csv="{results}/figures/sm_ratio.csv",
    log:
        "{results}/logs/plot_sm_ratio.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing speed against SMs of the compression"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule plot_pools:
    input:
        rows="{results}/rows.jsonl",
        script=script("plot_pools.py"),
        style=[script("plotting.py"), script("naming.py")],
    output:
        svg=report(
            "{results}/figures/pools.svg",
            caption="../report/pools.rst",
            category="Figures",
            labels={"figure": "pools", "shows": "speed against the KV pool"},
        ),
        csv="{results}/figures/pools.csv",
    log:
        "{results}/logs/plot_pools.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Drawing speed against the size of the KV pool"
    shell:
        "python {input.script} --rows {input.rows} --svg {output.svg} --csv {output.csv} 2> {log}"


rule figures:
    input:
        rows_of_this_run(),
        expand("results/figures/{figure}.{kind}", figure=FIGURES, kind=["svg", "csv"]),
