# What this machine is and has. Later the compatibility shim and the proof of the SM partitions join here.


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
        "fastcache doctor > {output} 2> {log}"


rule doctor:
    input:
        "results/environment/doctor.txt",
