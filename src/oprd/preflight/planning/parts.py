"""The parts of memory: the rows of the plan's table, in order."""

PROCESS, STUDENT, TEACHER = "process and libraries", "student's weights", "teacher's weights"
REFERENCE, GRADIENTS, OPTIMISER = "bridge and anchor", "student's gradients", "optimiser's state"
BUCKETS, GATHERED, ENGINE = "DDP's buckets", "unsharded layers", "vLLM"
SAMPLING, READING, ACTIVATIONS = "cache and sampling", "teacher's forward", "student's activations"
LOGITS, HOST = "output loss", "rollouts and indices"

ORDER = (
    *(PROCESS, STUDENT, TEACHER, REFERENCE, GRADIENTS, OPTIMISER, BUCKETS, GATHERED),
    *(ENGINE, SAMPLING, READING, ACTIVATIONS, LOGITS, HOST),
)
