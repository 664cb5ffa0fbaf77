"""What the executors and adapters need to know of Hugging Face models: the only room that does."""
