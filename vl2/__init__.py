"""The DeepSeek-VL2 model: everything from config.json to generation; imports nothing else of this repository."""
