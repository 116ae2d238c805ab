"""Reading what people already have: DCP folders, torch.save files, DeepSpeed and Hugging Face folders.

Used by ``distckpt convert`` alone; nothing here runs unless it is asked for. Pickles go through a child process.
"""
