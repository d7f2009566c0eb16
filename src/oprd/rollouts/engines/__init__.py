"""vLLM and its peers: for rollouts in training, for evaluation and the bridge."""
