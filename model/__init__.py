"""What is computed: configuration, Llama forward and backward, LoRA, weights, tokenizer, chat."""
