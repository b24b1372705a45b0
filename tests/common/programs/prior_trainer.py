"""One step of the small LLaVA with PRIOR in each trainer, on two ranks: loss, gradient and what is logged."""

import sys
from itertools import product

import torch

from common.hf_trainers import OPTIONS, TRAINERS, make_reference, make_trainer, step

out, folder = sys.argv[1:]
results = {}
for name, options, average in product(TRAINERS, ("paper", "batch"), (True, False)):
    changes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "average_tokens_across_devices": average,
        "ddp_backend": "gloo",
    }
    trainer = make_trainer(name, folder, changes=changes, reference=make_reference(), **OPTIONS[options])
    assert trainer.accelerator.num_processes == 2
    loss, gradient = step(trainer)
    results[name, options, average] = float(trainer.accelerator.reduce(torch.tensor(loss), "mean")), gradient
    results["logged", name, options, average] = trainer.state.log_history[0]
if trainer.accelerator.is_main_process:
    torch.save(results, out)
