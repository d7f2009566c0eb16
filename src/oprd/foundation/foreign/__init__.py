"""What other libraries keep private and we use all the same: one module for each library, named after it.

Each function says why there is no public way, and what would end it. TRL's are in
`oprd.training.foreign_trl`, since only that package imports TRL. `tests/trainer/test_foreign_names.py` holds
every name, and lets none be used elsewhere.
"""
