# What this machine is and has, whether sgl_kernel needs a shim here, and the proof that SM partitions are real.


rule inspect_machine:
    output:
        "results/environment/doctor.txt",
    log:
        "results/logs/inspect_machine.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Asking `fastcache doctor` what this machine can do"
    shell:
        "fastcache doctor 2> {log} | tee {output}"


rule doctor:
    input:
        "results/environment/doctor.txt",


# Writes "not needed" with the evidence, or builds sgl_kernel_shim.so beside the record (for LD_PRELOAD), or
# fails with the list of symbols that cannot be forwarded and the wheel to install instead.
rule build_shim:
    output:
        "results/environment/shim.json",
    log:
        "results/logs/build_shim.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "Comparing the symbols of sgl_kernel with those of torch"
    shell:
        "fastcache shim --output {output} 2> {log}"


# A proof that fails is still written: the report shows it, as it shows a cell that failed. It does not wait for
# build_shim: each process makes the shim it needs, and where none can be made another provider may do.
rule verify_greenctx:
    output:
        "results/environment/greenctx.json",
    log:
        "results/logs/verify_greenctx.log",
    priority: 10**6  # seconds, before every cell: most wait for it, and later all GPUs are rarely free
    conda:
        "../../envs/cpu.yaml"
    resources:
        gpu=GPUS,  # it looks at whole devices, and a cell beside it would be disturbed
    message:
        "Proving that a split of the SMs is real"
    shell:
        "fastcache prove-greenctx --output {output} 2> {log} || test -s {output}"
