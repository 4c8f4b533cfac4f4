"""A user's backward pass with BackPACK, and networks to take it through: for the extension and for the hook."""

import torch
from backpack import backpack, extend
from backpack.custom_module.branching import SumModule
from torch import nn


def kernel_as_it_ran(output, params):
    """The kernel [N, N, *out, *out] of a forward pass, from its graph: one sample and one output at a time."""
    rows = [
        torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in output.flatten()
    ]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).reshape(*output.shape, -1)
    return torch.tensordot(jacobian, jacobian, ([-1], [-1])).movedim(output.ndim, 1)


def zeros(output):
    return torch.zeros_like(output)


def itself(output):
    """The target at which the gradient of the loss is zero."""
    return output.detach()


def run(model, x, *extensions, modules=None, hook=None, loss_func=None, target=zeros, terms=None, oracle=True):
    """A backward pass with random numbers of a seed: the kernel of the network as it ran, and the loss."""
    modules, loss_func = [model] if modules is None else modules, nn.MSELoss() if loss_func is None else loss_func
    for module in (*modules, loss_func):
        extend(module)
    torch.manual_seed(1)
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    expected = kernel_as_it_ran(model(x), params) if oracle else None
    torch.manual_seed(1)
    with backpack(*extensions, extension_hook=hook):
        output = model(x)
        loss = loss_func(output, target(output) if callable(target) else target)
        (loss if terms is None else loss + terms(model, output)).backward()
    return expected, loss_func


def samples(*shape):
    return torch.randn(shape).double()


def between(*layers):
    """A network with layers between two linear ones."""
    return nn.Sequential(nn.Linear(5, 6), *layers, nn.Linear(6, 3)).double()


def zeros_then(*layers):
    """The same, where half of the first features are zero."""
    model = between(*layers)
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3] = 0, 0
    return model


def image_net(dim, *layers):
    """A convolutional network on [N, 1, 3, ...] with layers between its convolutions."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    return nn.Sequential(conv(1, 4, 2), *layers, conv(4, 3, 2), nn.Flatten(), nn.Linear(3, 2)).double()


class Between(nn.Module):
    """Computes something of its own between two layers, or beside the second."""

    def __init__(self, function, first=None, second=None):
        super().__init__()
        self.function = function
        self.first = nn.Linear(5, 6) if first is None else first
        self.second = nn.Linear(6, 3) if second is None else second
        self.double()

    def forward(self, x):
        return self.function(self.first(x), self.second)

    @property
    def layers(self):
        return [self.first, self.second]


def images():
    return nn.Conv2d(1, 2, 2), nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3))


VIEWS = {
    "transpose": lambda: Between(lambda h, f: f(h.transpose(2, 3)), *images()),
    "permute": lambda: Between(lambda h, f: f(h.permute(0, 1, 3, 2)), *images()),
    "channels": lambda: Between(lambda h, f: f(h.flip(1)), *images()),
    "chunk": lambda: Between(lambda h, f: f(h.chunk(2, -1)[0]), second=nn.Linear(3, 3)),
    "second_chunk": lambda: Between(lambda h, f: f(h.chunk(2, -1)[1]), second=nn.Linear(3, 3)),
    "slice": lambda: Between(lambda h, f: f(h[:, :4]), second=nn.Linear(4, 3)),
    "slice_of_the_output": lambda: Between(lambda h, f: f(h)[:, :2]),
    "samples": lambda: Between(lambda h, f: f(h.roll(1, 0))),
    "view": lambda: Between(lambda h, f: f(h.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6))),
    "reshape": lambda: Between(lambda h, f: f(h.reshape(-1, 2, 3)), second=nn.Linear(3, 1)),
    "expand": lambda: Between(lambda h, f: f(h.unsqueeze(1).expand(-1, 2, -1))[:, 0]),
    "samples_for_features": lambda: Between(lambda h, f: f(h.T), nn.Linear(5, 4), nn.Linear(4, 3)),
    "clone": lambda: Between(lambda h, f: f(h.clone())),
    "sin_beside": lambda: Between(lambda h, f: f(h) + h.sin(), second=nn.Linear(6, 6)),
    "sin_into_a_sum": lambda: Between(lambda h, f: f(h) * h[:, :3]),
    "residual": lambda: Between(lambda h, f: f(h) + h, second=nn.Linear(6, 6)),
}


class Branches(nn.Module):
    """Two branches behind a layer, which a module sums."""

    def __init__(self, first, second):
        super().__init__()
        self.stem, self.first, self.second, self.sum = nn.Linear(5, 3), first, second, SumModule()
        self.double()

    def forward(self, x):
        h = self.stem(x)
        return self.sum(self.first(h), self.second(h))


class NotExtended(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
