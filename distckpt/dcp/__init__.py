"""Live sharded tensors to and from the format: agreement between ranks, plans, writing, reading.

The first layer that may import torch; nothing here touches a training process group.
"""
