# Compressors of one's own: `snakemake results/compressors/smollm2-f5.safetensors`, or `.../smollm2-kvzap.safetensors`. Not
# part of `all`.


rule training_text:
    input:
        str(BASE / "envs" / "text.txt"),
    output:
        train=multiext("resources/text/", "wikipedia.txt", "docstrings.txt"),
        heldout="resources/text/heldout.txt",
    log:
        "results/logs/training_text.log",
    benchmark:
        "results/benchmarks/training_text.tsv"
    retries: 2
    localrule: True
    conda:
        "../../envs/cpu.yaml"
    params:
        folder=subpath(output.heldout, parent=True),
        wheels="resources/wheels",
        # Only its data matter, so that one wheel serves every platform and Python.
        wheel="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        platform="--implementation cp --python-version 3.11 --abi cp311 --platform manylinux_2_24_x86_64",
    message:
        "Getting text to train on: a slice of Wikipedia from gensim's wheel (28 MB, once), docstrings of torch and numpy"
    shell:
        "(python -m pip download --quiet --no-deps --only-binary :all: {params.platform} --dest {params.wheels}"
        " --require-hashes -r {input}"
        " && python -m fastcache.training.text --output {params.folder} --packages numpy torch"
        " --wikipedia {params.wheels}/{params.wheel}) 2>&1 | tee {log}"


# A run that was cut leaves OUTPUT.state beside its output, and the next one goes on from there.
rule train_compressor:
    input:
        weights="resources/models/SmolLM2-135M-Instruct/model.safetensors",
        train=rules.training_text.output.train,
        heldout=rules.training_text.output.heldout,
    output:
        "results/compressors/smollm2-f{factor}.safetensors",
    log:
        "results/logs/train_compressor/smollm2-f{factor}.log",
    benchmark:
        "results/benchmarks/train_compressor/smollm2-f{factor}.tsv"
    wildcard_constraints:
        factor=r"[1-9]\d*",
    conda:
        "../../envs/cpu.yaml"
    resources:
        gpu=1,
    params:
        command=TRAIN_COMMAND,
        model=subpath(input.weights, parent=True),
        settings="--steps 4000 --recent 32 --context 1024",
    message:
        "Training networks that merge {wildcards.factor} KV entries into one; progress is in {log}"
    shell:
        "{params.command} train-compressor --model {params.model} --text {input.train}"
        " --heldout {input.heldout} --factor {wildcards.factor} {params.settings} --output {output} > {log} 2>&1"


rule train_scorer:
    input:
        weights=rules.train_compressor.input.weights,
        train=rules.training_text.output.train,
        heldout=rules.training_text.output.heldout,
    output:
        "results/compressors/smollm2-kvzap.safetensors",
    log:
        "results/logs/train_scorer/smollm2-kvzap.log",
    benchmark:
        "results/benchmarks/train_scorer/smollm2-kvzap.tsv"
    conda:
        "../../envs/cpu.yaml"
    resources:
        gpu=1,
    params:
        command=TRAIN_COMMAND,
        model=subpath(input.weights, parent=True),
        settings="--windows 800 --weight-decay 1",
    message:
        "Training networks that tell KVzip's scores from hidden states; progress is in {log}"
    shell:
        "{params.command} train-scorer --model {params.model} --text {input.train}"
        " --heldout {input.heldout} {params.settings} --output {output} > {log} 2>&1"


# The small multimodal model of coloured shapes, from scratch and then some: results/published/shapes-model/ holds one that
# was trained so. In two rules, so that a run that was cut in the second part does not do the first again.
rule train_shapes_base:
    output:
        multiext(
            "results/shapes/base/",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "training.json",
        ),
    log:
        "results/logs/train_shapes/base.log",
    benchmark:
        "results/benchmarks/train_shapes/base.tsv"
    conda:
        "../../envs/dev.yaml"
    resources:
        gpu=1,
    params:
        command=TRAIN_COMMAND,
        folder=subpath(output[0], parent=True),
        settings="",
    message:
        "Training the small multimodal model of coloured shapes: {params.folder}; progress is in {log}"
    shell:
        "{params.command} train-shapes {params.settings} --output {params.folder} > {log} 2>&1"


use rule train_shapes_base as train_shapes with:
    input:
        rules.train_shapes_base.output,
    output:
        multiext(
            "results/shapes/model/",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "training.json",
        ),
    log:
        "results/logs/train_shapes/model.log",
    benchmark:
        "results/benchmarks/train_shapes/model.tsv"
    params:
        command=TRAIN_COMMAND,
        folder=subpath(output[0], parent=True),
        settings=lambda wildcards, input: (
            f"--start {os.path.dirname(input[0])} --steps 1300 --align-steps 0 --coarse-steps 0"
            " --learning-rate 1e-3 --seed 1"
        ),


rule train_shapes_compressor:
    input:
        rules.train_shapes.output,
    output:
        "results/shapes/f{factor}.safetensors",
    log:
        "results/logs/train_shapes/f{factor}.log",
    benchmark:
        "results/benchmarks/train_shapes/f{factor}.tsv"
    wildcard_constraints:
        factor=r"[1-9]\d*",
    conda:
        "../../envs/cpu.yaml"
    resources:
        gpu=1,
    params:
        command=TRAIN_COMMAND,
        model=subpath(input[0], parent=True),
        settings="--steps 400 --n-sink 1 --hidden 64 --batch-size 8 --learning-rate 3e-3",
    message:
        "Training networks that merge {wildcards.factor} KV entries of pictures into one; progress is in {log}"
    shell:
        "{params.command} train-compressor --model {params.model} --shapes"
        " --factor {wildcards.factor} {params.settings} --output {output} > {log} 2>&1"
