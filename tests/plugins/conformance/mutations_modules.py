"""Defects of modules as such and of predictors, their policies and weights adapters."""

from __future__ import annotations

from defects import Change, Mutation, dit, text, vae

# Places in the toy's files.
_BUILT = "self.channels, self.width = channels, width\n"
_BUFFER = 'self.register_buffer("frequencies", self._frequencies(), persistent=False)'
_START = "        if conditions:\n            raise TypeError"
_END = "return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(B, C, T, H, W)"
_CAST = "latents, text = latents.to(self.embed.weight.dtype), text.to(self.embed.weight.dtype)"
_GATED = "return tokens + self.gate * torch.tanh(self.mlp(seen + told))"
_COUNTING = (
    (
        "self.gate = nn.Parameter(torch.zeros(width))",
        "self.gate = nn.Parameter(torch.zeros(width))\n        self.calls = 0",
    ),
    (_GATED, "self.calls += 1\n        " + _GATED.replace("seen + told", "self.calls * seen + told")),
)
_FUNCTION = """
class Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return BACKWARD


class ToyBlock(nn.Module):"""


def _odd_gradient(backward: str) -> tuple[tuple[str, str], ...]:
    """The output with a gradient of one's own."""
    function = _FUNCTION.replace("BACKWARD", backward)
    return (
        ("class ToyBlock(nn.Module):", function.strip()),
        (_END, _END.replace("patches", "Odd.apply(patches)", 1)),
    )


MODULES = (
    dit("builds-a-module", "not a torch.nn.Module", ("class ToyDiT(nn.Module):", "class ToyDiT:"),
         ("        super().__init__()\n        self.channels", "        return\n        self.channels")),
    dit("build-changes-no-global-setting", "torch's matmul precision",
         (_BUILT, _BUILT + "        torch.set_float32_matmul_precision('medium')\n")),
    dit("parameters-are-fp32", "head.weight is torch.float64",
         (_BUFFER, _BUFFER + "\n        self.head = self.head.double()")),
    dit("no-tensor-is-shared-by-accident", "lie in one memory",
         (_BUFFER, _BUFFER + "\n        self.blocks[1].read.weight.data = self.blocks[0].read.weight.data")),
    dit("train-and-eval-reach-every-part", "in the other mode",
         ("    def init_module", "    def train(self, mode=True):\n        self.training = mode\n        return self\n\n"
          "    def init_module")),
    vae("comes-frozen-and-in-eval-mode", "leaves parameters trainable",
         ("    def decode", "    def requires_grad_(self, requires_grad=True):\n        return self\n\n    def decode")),
    vae("random-weights-are-the-same-everywhere", "other values in a second build",
         ("self.decoder = nn.Linear(latent_channels, 12)",
          "self.decoder = nn.Linear(latent_channels, 12)\n        import os\n        "
          "torch.default_generator.manual_seed(int.from_bytes(os.urandom(4), 'little'))\n        "
          "self.decoder.reset_parameters()")),
    vae("missing-folder-is-a-user-error", "is accepted", ("if not Path(folder).is_dir():", "if not folder:")),
    text("missing-folder-is-a-user-error", "FileNotFoundError",
          ("if not Path(folder).is_dir():", "if not list(Path(folder).iterdir()):")),
    dit("eval-is-deterministic", "different values", (_CAST, _CAST + "\n        latents = F.dropout(latents, 0.5)")),
    dit("eval-leaves-generators-alone", "torch's global generator", (_CAST, _CAST + "\n        torch.rand(1)")),
    vae("eval-leaves-generators-alone", "numpy's global generator",
         ("B, _, T, H, W = video.shape", "__import__('numpy').random.rand()\n        B, _, T, H, W = video.shape")),
    dit("prints-nothing", "use logging", (_CAST, _CAST + "\n        print(latents.shape)")),
    dit("inputs-are-not-modified", "latents", (_CAST, _CAST + "\n        latents.mul_(0.5)")),
    vae("inputs-are-not-modified", "video", ("B, _, T, H, W = video.shape",
                                             "video.clamp_(-0.5, 0.5)\n        B, _, T, H, W = video.shape")),
    dit("strided-inputs-work", "use reshape", (_CAST, "latents = latents.view(-1).view(B, C, T, H, W)\n        " + _CAST)),
    dit("samples-are-independent", "when a second is beside it", (_CAST, _CAST + "\n        text = text - text.mean(0)")),
    text("samples-are-independent", "when a second is beside it",
          ("words = self.table(input_ids)", "words = self.table(input_ids) - self.table(input_ids).mean(0)")),
    dit("output-is-finite", "not finite", (_END, _END + ".log()")),
    dit("state-dict-round-trip", "not in its state dict",
         (_BUFFER, _BUFFER + "\n        self.start = torch.zeros(1)"),
         (_END, "patches = patches + self.start\n        " + _END),
         ("module.gate)\n", "module.gate)\n        self.start = torch.rand(1)\n")),
    dit("deepcopy-works", "raises TypeError",
         (_BUFFER, _BUFFER + "\n        self.lock = __import__('threading').Lock()")),
    vae("deepcopy-works", "computes something else",
         ("    def decode", "    def __deepcopy__(self, memo):\n        "
          "return type(self)(latent_channels=self.latent_channels)\n\n    def decode")),
    dit("post-build-is-idempotent", "changes module (root)",
         ("model.prepared = True", "model.register_forward_hook(lambda module, args, out: None)"), file="hooks.py"),
)  # fmt: skip

PREDICTOR = (
    dit("predicts-the-latents-shape", "become [2, 4, 2, 4, 4, 1]", (_END, _END + ".unsqueeze(-1)")),
    dit("predicts-the-latents-shape", "a tuple instead of a tensor", (_END, _END + ", None")),
    dit("other-sizes-work", "raise RuntimeError",
         ("patches = latents.reshape(B, C, T, H // 2, 2, W // 2, 2)", "patches = latents.reshape(B, C, 2, 2, 2, 2, 2)")),
    dit("fp32-stays-fp32", "torch.bfloat16", (_END, _END + ".bfloat16()")),
    dit("bf16-parameters-work", "with bf16 parameters", (_CAST, "latents, text = latents.float(), text.float()")),
    dit("bf16-parameters-work", "away from fp32's",
         (_CAST, _CAST + "\n        if latents.dtype is torch.bfloat16:\n            latents = latents * 2")),
    dit("timesteps-are-per-sample", "does not depend on the timestep",
         ("angles = timestep.float().view(B, 1)", "angles = 0 * timestep.float().view(B, 1)")),
    dit("timesteps-are-per-sample", "changes the first one's prediction",
         ("angles = timestep.float().view(B, 1)", "angles = timestep.float().mean().view(1, 1).expand(B, 1)")),
    dit("prompt-matters", "does not depend on the prompt", ("seen + told", "seen + 0 * told")),
    dit("latents-matter", "does not depend on the latents", (_CAST, _CAST + "\n        latents = 0 * latents")),
    dit("prompt-mask-is-respected", "behind the mask change", ("attn_mask=keep.unsqueeze(1)", "attn_mask=None")),
    dit("prompt-mask-is-respected", "prompt_mask is not used",
         ("attn_mask=keep.unsqueeze(1)", "attn_mask=None"), (_CAST, _CAST + "\n        text = 0 * text")),
    dit("prompt-list-of-one-works", "prompt=[tensor] raises",
         ("text = prompt[0] if isinstance(prompt, list) else prompt", "text = prompt")),
    dit("unknown-condition-is-refused", "is accepted", ("        if conditions:", "        if False:")),
    dit("gradients-reach-every-parameter", "get no gradient", ("self.read(seen)", "self.read(seen).detach()")),
    dit("gradients-reach-every-parameter", "a gradient of zeros", ("self.read(seen), text", "0 * self.read(seen), text")),
    dit("gradients-reach-every-parameter", "not finite", *_odd_gradient("grad / 0")),
    dit("gradients-are-right", "its gradient says", *_odd_gradient("1.5 * grad")),
    dit("learns", "the loss went from", *_odd_gradient("-grad")),
)  # fmt: skip

INITIAL_WEIGHTS = (
    dit("builds-on-meta", "head.weight", ("self.head = nn.Linear(width, 4 * channels)",
                                           "self.head = nn.Linear(width, 4 * channels, device='cpu')")),
    dit("build-reads-no-weights", "reads /",
         (_BUILT, _BUILT + "        import tempfile\n        tempfile.NamedTemporaryFile(suffix='.bin')\n")),
    dit("meta-and-cpu-have-the-same-tensors", "absent",
         (_BUFFER, "if not self.head.weight.is_meta:\n            " + _BUFFER)),
    dit("first-values-are-complete", "init_module", ("nn.init.zeros_(module.gate)", "pass")),
    dit("state-is-registered", "scale is a plain tensor", (_BUILT, _BUILT + "        self.scale = torch.ones(width)\n")),
    dit("state-is-registered", "layers holds a ToyBlock in a list",
         (_BUILT, _BUILT + "        self.layers = [ToyBlock(width)]\n")),
    dit("first-values-are-keyed", "other first values",
         ("nn.init.zeros_(module.gate)",
          "import os\n        torch.default_generator.manual_seed(int.from_bytes(os.urandom(4), 'little'))\n        "
          "nn.init.normal_(module.gate)")),
    dit("first-values-are-the-constructors", "the constructor fills blocks.0.gate with 0",
         ("nn.init.zeros_(module.gate)", "nn.init.ones_(module.gate)")),
    dit("first-values-are-the-constructors", "standard deviation",
         (_BUFFER, "nn.init.normal_(self.head.weight, std=0.001)\n        " + _BUFFER)),
    dit("buffers-survive-meta", "reset_buffers",
         ("self.frequencies = self._frequencies().to(device)", "self.frequencies = torch.ones(self.width // 2)")),
    dit("weights-folder-round-trip", "must be inverse", ('key.replace("layers.", "blocks.")', "key"), file="weights.py"),
    dit("adapter-is-one-to-one", "is not the inverse", ('key.replace("layers.", "blocks.")', "key"), file="weights.py"),
    dit("adapter-is-one-to-one", "one name",
         ('key.replace("blocks.", "layers.")', 'key.rsplit(".", 1)[-1]'), file="weights.py"),
    dit("adapter-knows-its-config", "finds nothing", ("config.get(name) != fields[name]", "False"), file="weights.py"),
    dit("adapter-knows-its-config", "objects to what",
         ('{"_class_name": "ToyDiT", **fields}', '{"_class_name": "ToyDiT"}'),
         ("{config[name]}", "{config.get(name)}"), file="weights.py"),
)  # fmt: skip

SHARDING = (
    dit("policy-makes-a-plan", "layers", ('units=("blocks.{*}", "head")', 'units=("layers.{*}",), ignored=("nothing",)'),
         file="policy.py"),
    dit("policy-covers-each-parameter-once", "is the same tensor",
         (_BUFFER, _BUFFER + "\n        self.blocks[1].mlp.weight = self.blocks[0].mlp.weight")),
    Mutation("units-are-worth-it", "predictor/toy_dit", "no unit besides the root", (
        Change("policy.py", 'units=("blocks.{*}", "head"),', ""),
        Change("predictor.py", "nn.ModuleList(ToyBlock(width) for _ in range(num_layers))",
               "nn.Sequential(*(ToyBlock(width) for _ in range(num_layers)))"),
    )),
    dit("policy-makes-a-plan", "belongs to no stage", ('first=("embed", "time", "text")', 'first=("embed",)'), file="policy.py"),
    dit("stages-compute-the-whole", "another gradient in its stage", ("return tokens, text", "return tokens, text.detach()")),
    dit("stages-compute-the-whole", "something else than the whole",
         ("tokens, text = stage.received", "text, tokens = (2 * t for t in reversed(stage.received))")),
    dit("stages-compute-the-whole", "stage_boundary says", ("T * H * W // 4", "T * H * W")),
    dit("shared-sequences-equal-one", "two ranks that share each sequence", ("blocks.{*}.attend", "blocks.0.attend"),
         file="policy.py"),
    dit("units-run-in-order", "prefetching would gather", ('"blocks.{*}", "head"', '"head", "blocks.{*}"'),
         file="policy.py"),
    dit("units-run-in-order", "never calls",
         ("patches = self.head(tokens)", "patches = F.linear(tokens, self.head.weight, self.head.bias)")),
    dit("policy-fits-with-all-of-it", "offloaded as a whole",
         ("aliases=", 'offload_activations=("blocks.{*}", "blocks.0.mlp"), aliases='), file="policy.py"),
    dit("policy-fits-with-all-of-it", "is a unit itself", ('aligned=("blocks', 'aligned=("head", "blocks'), file="policy.py"),
    dit("policy-fits-with-all-of-it", "do not agree on a number", ("aliases=", 'experts=("blocks.0",), aliases='),
         file="policy.py"),
    Mutation("units-run-in-order", "predictor/toy_dit", "nothing would happen there", (
        Change("policy.py", "aliases=", 'recompute=("blocks.{*}.idle",), aliases='),
        Change("predictor.py", "        self.mlp = nn", "        self.idle = nn.Linear(width, width)\n        self.mlp = nn"),
    )),
    dit("aliases-name-modules", "attention", ('"layers.{*}": "blocks.{*}"', '"layers.{*}": "blocks.{*}.attention"'),
         file="policy.py"),
    dit("fp32-inputs-are-arguments", "fp32_inputs names t,", ("aliases=", 'fp32_inputs=("t",), aliases='),
         file="policy.py"),
)  # fmt: skip

RANKS = (
    dit("recompute-is-exact", "when it runs a second time", *_COUNTING),
    dit("two-ranks-equal-one", "the loss is",
         (_END, "if torch.distributed.is_initialized():\n            "
          "patches = patches * (1 + torch.distributed.get_rank())\n        " + _END)),
    dit("two-ranks-equal-one", "on 2 ranks:",
         (_END, "if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:\n            "
          "raise RuntimeError('one rank only')\n        " + _END)),
    dit("mixed-precision-works", "on 2 ranks: RuntimeError", (_CAST, "latents, text = latents.float(), text.float()")),
    dit("first-values-do-not-depend-on-ranks", "blocks.0.gate",
         ("nn.init.zeros_(module.gate)", "nn.init.constant_(module.gate, torch.distributed.get_world_size())")),
    dit("resume-is-bit-equal", "the losses are", *_COUNTING),
)  # fmt: skip
