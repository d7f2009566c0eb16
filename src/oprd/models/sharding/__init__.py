"""FSDP2 and ZeRO: models, tables and state spread over ranks."""
