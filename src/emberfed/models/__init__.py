"""The model side: sparse mixture-of-experts models, how many of their experts are active, and LoRA on them."""
