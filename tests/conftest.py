import pytest
import torch

# Small networks spend more time waiting for a second thread than it saves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
