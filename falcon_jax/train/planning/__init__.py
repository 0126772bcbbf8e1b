"""Does a training run fit, and how fast would it be: the real step, compiled for GPUs that are not there.

devices: what each GPU has. job: what is to be trained, over which mesh. compiler: the process that compiles it. hlo:
reads the compiled program. cost: how long that would take. plan: all of it together. search: many of them. serving:
arithmetic for a model that only runs. report: plans as text.
"""
