"""The keys that decide what a run computes. A resumed run keeps them; others may change."""

MODELS_AND_DATA = (
    *("model_name_or_path", "teacher_model_name_or_path", "teacher_model_revision"),
    *("model_init_kwargs", "teacher_model_init_kwargs", "teacher_quantization"),
    "reference_model_name_or_path",
    *(
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_streaming",
        "max_prompt_length",
        "shuffle_dataset",
    ),
    *("chat_template_kwargs", "teacher_chat_template", "teacher_chat_template_kwargs"),
    *("teacher_tokenization", "drop_unrenderable_prompts", "seed", "data_seed"),
)
ADAPTERS = (
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora"),
)
OBJECTIVE = (
    *("layers", "positions", "bridge", "bridge_rank", "final_norm", "representation_loss"),
    *("teacher_extrapolation", "row_weights"),
    *("representation_weight", "anchor_weight", "output_loss", "output_weight"),
    *("output_top_k", "output_baseline"),
    *("output_support", "output_positions", "renormalize", "divergence", "student_temperature"),
    *("teacher_temperature", "reduction", "mask_truncated_completions"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_clip_max"),
)
ROLLOUTS = (
    *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "generation_kwargs", "cache_implementation", "use_vllm"),
    *("vllm_structured_outputs_regex", "max_tool_calling_iterations"),
)
OPTIMISER = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "neftune_noise_alpha", "disable_dropout", "bf16", "fp16"),
)
BRIDGE_FIT = (
    *("rank", "max_rank", "method", "affine", "standardize", "directions", "holdout", "num_prompts"),
    *("batch_size", "dtype", "engine"),
)
DECIDING = (*MODELS_AND_DATA, *ADAPTERS, *OBJECTIVE, *ROLLOUTS, *OPTIMISER, *BRIDGE_FIT)
