import torch

# Small networks spend more time waiting for a second thread than it saves.
torch.set_num_threads(1)
