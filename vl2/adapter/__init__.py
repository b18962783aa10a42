"""Files of adapters: ours, PEFT's, PaddleNLP's."""
