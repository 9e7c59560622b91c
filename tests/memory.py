"""How much memory tensors take, counted storage by storage."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes that live at once of the tensors that are made inside, and of those that a source hands out."""

    def __init__(self):
        super().__init__()
        self.stores, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                store = tensor.untyped_storage()
                self.stores[store._cdata] = StorageWeakRef(store), store.nbytes()
        self.stores = {key: (ref, n) for key, (ref, n) in self.stores.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.stores.values()))
        return out
