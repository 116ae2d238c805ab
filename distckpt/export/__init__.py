"""Writing for others: a plain DCP folder, a torch.save file, Hugging Face safetensors.

Tensors come as streams (stream.py), so that no writer needs a whole model, and mostly not a whole tensor, in memory.
"""
