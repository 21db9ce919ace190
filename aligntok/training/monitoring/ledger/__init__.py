"""A ledger of one training step, made without running it: what each operator costs, and what each lever is worth.

    assumptions    GPUs by their data sheets, and every number that is assumed, with its source
    measured       some of them replaced by what `make gpu-check` measured
    record         the operators of a real step on the meta device, one by one
    fusion         the same step as a compiler would fuse it
    pricing        seconds of an operator, and of a step: device and host as two queues
    variants       eager, compiled, graphs, fp8; and the levers

Every time in it is a prediction.
"""
