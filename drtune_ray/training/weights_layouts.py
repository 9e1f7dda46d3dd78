"""Layouts of weights files: who wrote one, told by its keys, and where its encoder is.

A layout says which of several encoders a file's authors evaluate (MoCo's query encoder, not its key
encoder) and how names become timm's where timm itself has no conversion. The tests hold a list of
keys for each, with its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
PCL_KEYS = 16384  # length of PCL's queue; MoCo's is 65536


@dataclass(frozen=True)
class Layout:
    """How a program lays out its weights files.

    Attributes:
        name: Value of ``backbone.weights_format``.
        title: Name for people.
        marks: Regular expressions; each is found in a name of such a file, behind a dot or first.
        num_keys: Length of its queue of keys, where only that tells it from another one.
        encoders: Words of the paths to its encoders and what each is, the one to take first.
        anchor: A name of the file that timm's or our conversion needs at the top.
        convert: Our conversion to timm's names; None where timm's own serves.
        in_order: Whether its modules stand in the order of timm's, under other names.
    """

    name: str
    title: str
    marks: tuple[str, ...] = ()
    num_keys: int | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)
    anchor: str = ""
    convert: Callable[[Tensors], dict[str, Tensor]] | None = None
    in_order: bool = False

    def is_of(self, shapes: Shapes) -> bool:
        """Whether the names of a file bear all marks."""
        text = "\n".join(shapes)
        if not self.marks or not all(
            re.search(rf"(^|[./])({mark})", text, re.MULTILINE) for mark in self.marks
        ):
            return False
        return self.num_keys is None or self.num_keys in _queue_lengths(shapes)

    def rank(self, key: str) -> int:
        """Return the place of the encoder at a dotted path in the order of preference."""
        words = key.split(".")
        places = [at for at, word in enumerate(self.encoders) if word in words]
        return min(places, default=len(self.encoders))

    def role(self, key: str) -> str:
        """Return what the encoder at a dotted path is; empty if the layout does not say."""
        return ([*self.encoders.values(), ""])[self.rank(key)]


def _queue_lengths(shapes: Shapes) -> set[int]:
    return {
        shape[1]
        for name, shape in shapes.items()
        if name.rpartition(".")[2] == "queue" and len(shape) == 2
    }


# ---- conversions that timm lacks

TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
)


def _of_torchvision_vit(given: Tensors) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in given.items():
        for pattern, new in TORCHVISION_VIT:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def _of_beit_pretraining(given: Tensors) -> dict[str, Tensor]:
    """Give each block the shared table, and the last norm to the mean of the patches.

    As BEiT's own fine-tuning does with the table; the norm goes where timm's EVA conversion puts
    it, because the encoder has no other place for it.
    """
    blocks = {found[0] for name in given if (found := re.match(r"blocks\.\d+\.attn\.", name))}
    table = {f"{block}relative_position_bias_table": given[SHARED_TABLE] for block in blocks}
    rest = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in given.items()}
    del rest[SHARED_TABLE]
    return rest | table


# ---- the layouts, the more special ones first

_QUERY_AND_KEY = {"encoder_q": "query encoder", "encoder_k": "key encoder"}
_TEACHER_AND_STUDENT = {"teacher": "teacher", "student": "student"}
_RESNET = r"(conv1|layer1)\."
LAYOUTS = (
    Layout("hcsc", "HCSC", (r"encoder_q\.", r"queue_index$"), encoders=_QUERY_AND_KEY),
    Layout("pcl", "PCL", (r"encoder_q\.", r"queue$"), PCL_KEYS, _QUERY_AND_KEY),
    Layout("moco_v2", "MoCo v2", (r"encoder_q\.fc\.0\.",), encoders=_QUERY_AND_KEY),
    Layout("moco_v1", "MoCo v1", (r"encoder_q\.",), encoders=_QUERY_AND_KEY),
    Layout(
        "moco_v3",
        "MoCo v3",
        (r"base_encoder\.",),
        encoders={"base_encoder": "base encoder", "momentum_encoder": "momentum encoder"},
    ),
    Layout(
        "byol",
        "BYOL (byol-pytorch)",
        (r"online_encoder\.", r"online_predictor\."),
        encoders={"online_encoder": "online encoder", "target_encoder": "target encoder"},
    ),
    Layout("simsiam", "SimSiam", (rf"encoder\.{_RESNET}", r"predictor\.")),
    Layout(
        "infomin",
        "InfoMin (PyContrast)",
        (rf"encoder\.{_RESNET}", r"head\.0\."),
        encoders={"model": "trained encoder", "model_ema": "momentum encoder"},
    ),
    Layout("swav", "SwAV", (r"projection_head\.", r"prototypes")),
    Layout("barlow_twins", "Barlow Twins", (rf"backbone\.{_RESNET}", r"projector\.0\.")),
    Layout(
        "ibot",
        "iBOT",
        (r"head\.last_layer2\.|backbone\.masked_embed$",),
        encoders=_TEACHER_AND_STUDENT,
    ),
    Layout("dino", "DINO", (r"head\.last_layer\.weight_g$",), encoders=_TEACHER_AND_STUDENT),
    Layout("dinov3", "DINOv3", (r"storage_tokens$|rope_embed\.periods$",)),
    Layout("mae", "MAE", (r"decoder_blocks\.", r"mask_token$")),
    Layout("dinov2", "DINOv2", (r"mask_token$", r"blocks\.0\.ls1\.gamma$")),
    Layout(
        "beit_pretraining",
        "BEiT, from pretraining",
        (re.escape(SHARED_TABLE), r"attn\.q_bias$"),
        anchor=SHARED_TABLE,
        convert=_of_beit_pretraining,
    ),
    Layout("beit", "BEiT", (r"relative_position_bias_table$", r"attn\.q_bias$")),
    Layout("siglip", "SigLIP", (r"MAPHead_0/probe$|visual\.trunk\.attn_pool\.",)),
    Layout("clip", "CLIP", (r"visual\.class_embedding$",), anchor="visual.class_embedding"),
    Layout("google_vit", "ViT of Google's JAX code", (r"Transformer/encoder_norm/scale$",)),
    Layout(
        "torchvision_vit",
        "ViT of torchvision",
        (r"encoder\.layers\.encoder_layer_0\.",),
        anchor="encoder.pos_embedding",
        convert=_of_torchvision_vit,
    ),
    Layout("deit", "DeiT, distilled", (r"dist_token$",)),
    Layout(
        "efficientnet_pytorch",
        "EfficientNet-PyTorch",
        (r"_conv_stem\.weight$", r"_blocks\.0\._depthwise_conv\."),
        in_order=True,
    ),
    Layout(
        "torchvision",
        "torchvision",
        (r"features\.0\.0\.weight$|trunk_output\.block1\.",),
        in_order=True,
    ),
)
PLAIN = Layout("timm", "names of timm")
FORMATS = {layout.name: layout for layout in (PLAIN, *LAYOUTS)}


def recognized(shapes: Shapes) -> Layout:
    """Return the layout of a file with tensors of these names and shapes.

    That is `PLAIN` where no other one is known: names of timm, which torchvision's ResNets and
    DeiT share, or none that anyone knows.
    """
    return next((layout for layout in LAYOUTS if layout.is_of(shapes)), PLAIN)


# ---- wrappers


def wrappers(key: str, entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a model was wrapped in when it was saved.

    Args:
        key: Dotted path to its tensors.
        entries: Keys at the top of the file.
    """
    words = key.split(".")
    found = {
        "torch.compile": "_orig_mod" in words,
        "DataParallel or DistributedDataParallel": "module" in words
        and "n_averaged" not in entries,
        "AveragedModel": "n_averaged" in entries,
        "EMA": any("ema" in word.split("_") for word in words),
        "Lightning": "pytorch-lightning_version" in entries,
    }
    return tuple(name for name, is_there in found.items() if is_there)
