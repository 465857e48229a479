"""DPO on batches without padding, and with each prompt once: `padding_free` and `shared_prompt` of FastDPOTrainer."""

from .support import PackingError
from .trainer import PackingTrainer

__all__ = ["PackingError", "PackingTrainer"]
