"""What a Falcon model is: one frozen dataclass, the published shapes, and config.json read and written.

Owns the meaning of every number that decides a forward pass, and refuses a set of numbers that has none.
Knows no arrays and no JAX. The names and defaults of Hugging Face's keys live in `hf_config`.

The trap: `num_kv_heads` is the number that the layer uses, not the one in config.json: the published
falcon-7b says 71 there and has one.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from falcon_jax import hf_config
from falcon_jax.errors import ConfigError
from falcon_jax.hf_config import require_flag, require_number, require_whole, yarn_attention_factor

RopeScaling = Literal["default", "linear", "dynamic", "yarn"]
Positions = Literal["alibi", "rope"]
Block = Literal["parallel", "sequential"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: all that the frequencies and the cos / sin tables depend on besides the head dim H.

    Raises:
        ConfigError: a number out of range, an unknown scaling, or a number that the scaling has no use for.

    Source: the meaning of each number is that of transformers 5.17, `modeling_rope_utils`.
    """

    theta: float = 10000.0  # base of the frequencies theta^(-2i/H)
    scaling: RopeScaling = "default"
    factor: float = 1.0  # context stretch, >= 1; 1 for "default"
    # "dynamic": the frequencies change once a sequence exceeds this many tokens. "yarn": tokens of the
    # pre-training context. FalconConfig puts its max_tokens here where these two leave it None.
    original_max_tokens: int | None = None
    # The rest is yarn's alone.
    attention_factor: float | None = None  # multiplies cos and sin; None: `table_scale` derives it from the factor
    beta_fast: float = 32.0  # rotations over the original context above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which a frequency is divided by the factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # round the ends of the ramp between the betas outwards to whole dimensions

    def __post_init__(self) -> None:
        for name, value in _checked_rope(vars(self)).items():
            object.__setattr__(self, name, value)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(f"rope beta_fast is {self.beta_fast}, below beta_slow {self.beta_slow}; swap them")
        used = {"theta", "scaling"}
        if self.scaling != "default":
            used |= {"factor"}
        if self.scaling == "dynamic":
            used |= {"original_max_tokens"}
        # A number that the scaling ignores is a misunderstanding, so it is not ignored.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.scaling != "yarn" and field.name not in used and value != field.default:
                raise ConfigError(
                    f"rope {field.name} is {value!r}, which {self.scaling!r} scaling does not use; remove it"
                )

    @property
    def table_scale(self) -> float:
        """What cos and sin are multiplied by: yarn's attention factor, 1.0 for every other scaling."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return yarn_attention_factor(self.factor, self.mscale, self.mscale_all_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig:
    """One model of the Falcon family. Hashable, so it can be a static argument of a jitted function.

    Raises:
        ConfigError: a value of the wrong type or out of range, or two values that contradict each other.
    """

    vocab_size: int  # V, rows of the embedding table
    width: int  # D, of the residual stream
    num_layers: int  # L
    num_heads: int  # N, query heads
    num_kv_heads: int  # K, key and value heads in effect: 1 is multi-query, N is multi-head
    mlp_width: int  # F
    positions: Positions
    rope: Rope | None = None  # exactly where positions == "rope"
    block: Block  # does the MLP read the block's input (parallel) or the attention's output (sequential)
    num_norms: Literal[1, 2]  # layer norms a block; 1: attention and MLP share one; sequential blocks have 2
    bias: bool = False  # on the four linear maps of a block; the head has none, norms always have
    tie_word_embeddings: bool = True  # is the head the embedding table
    max_tokens: int = 2048  # trained context length
    norm_epsilon: float = 1e-5
    # Token ids are not bounded by vocab_size: fine-tunes name a padding row that they appended to the table.
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02  # standard deviation of fresh weights
    hidden_dropout: float = 0.0  # probability
    attention_dropout: float = 0.0  # probability

    def __post_init__(self) -> None:
        for name, value in _checked(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_heads()
        self._check_block()
        self._check_positions()

    def _check_heads(self) -> None:
        width, heads, kv_heads = map(hf_config.label, ("width", "num_heads", "num_kv_heads"))
        if self.width % self.num_heads:
            raise ConfigError(
                f"{width} is {self.width}, which is not divisible by {heads} {self.num_heads}; "
                f"the nearest that is: {max(1, round(self.width / self.num_heads)) * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{kv_heads} is {self.num_kv_heads}, which does not divide {heads} {self.num_heads}; "
                f"possible are {', '.join(str(k) for k in _divisors(self.num_heads))}"
            )

    def _check_block(self) -> None:
        if self.block == "sequential" and self.num_norms != 2:
            raise ConfigError(f"num_norms is {self.num_norms} with sequential blocks, which have 2 layer norms")
        if self.block == "sequential" and self.num_kv_heads not in (1, self.num_heads):
            raise ConfigError(
                f"{hf_config.label('num_kv_heads')} is {self.num_kv_heads} with sequential blocks, which "
                f"have 1 (multi-query) or {self.num_heads} (multi-head); grouped heads need parallel blocks"
            )

    def _check_positions(self) -> None:
        if self.positions == "alibi":
            if self.rope is not None:
                raise ConfigError(f"rope is {self.rope!r} with positions 'alibi'; it must be None there")
            return
        if not isinstance(self.rope, Rope):
            raise ConfigError(f"rope is {self.rope!r} with positions 'rope'; it must be a Rope, such as Rope()")
        if self.head_dim % 2:
            raise ConfigError(
                f"the head dim, {hf_config.label('width')} {self.width} / {hf_config.label('num_heads')} "
                f"{self.num_heads}, is {self.head_dim}; rotary positions turn pairs of it: it must be even"
            )
        if self.rope.scaling == "dynamic" and self.head_dim < 4:
            raise ConfigError(f"the head dim is {self.head_dim}; dynamic rope scaling needs at least 4")
        self._settle_rope(self.rope)

    def _settle_rope(self, rope: Rope) -> None:
        if rope.scaling not in ("dynamic", "yarn"):
            return
        if rope.original_max_tokens is None:
            object.__setattr__(self, "rope", dataclasses.replace(rope, original_max_tokens=self.max_tokens))
        elif rope.scaling == "dynamic" and rope.original_max_tokens != self.max_tokens:
            raise ConfigError(
                f"original_max_position_embeddings is {rope.original_max_tokens} with dynamic rope scaling, "
                f"which starts at {hf_config.label('max_tokens')} {self.max_tokens}; make them equal"
            )

    @property
    def head_dim(self) -> int:
        """H: dimensions of one head."""
        return self.width // self.num_heads

    @property
    def num_groups(self) -> int:
        """G: query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def new_decoder_architecture(self) -> bool:
        """Hugging Face's flag, set only where needed: two norms in a parallel block, or grouped heads."""
        return self.block == "parallel" and (self.num_norms == 2 or 1 < self.num_kv_heads < self.num_heads)

    @property
    def num_parameters(self) -> int:
        """Numbers in the parameter tree; a tied head counts once."""
        query, key_value = self.width, self.num_kv_heads * self.head_dim  # N * H = D
        weights = self.width * (query + 2 * key_value + query + 2 * self.mlp_width)
        biases = query + 2 * key_value + self.width + self.mlp_width + self.width if self.bias else 0
        layer = weights + biases + self.num_norms * 2 * self.width
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.width
        return tables + self.num_layers * layer + 2 * self.width

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> "FalconConfig":
        """Reads Hugging Face's configuration: a dict, a config.json, or the folder that holds one.

        Takes what transformers 4.x and 5.x write and the older RefinedWeb and RefinedWebModel files. Keys
        that say nothing about the forward pass (dtype, auto_map, ...) are passed over.

        Raises:
            ConfigError: the file cannot be read, a key is missing, of the wrong type or unsupported, or two
                keys contradict each other. Names the file, the key, its value and what would be right.
        """
        if isinstance(source, Mapping):
            return cls._from_keys(source)
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        try:
            return cls._from_keys(_read_json(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def named(cls, name: str) -> "FalconConfig":
        """A preset by its name, or what `from_hf` reads at this path.

        Raises:
            ConfigError: there is neither, or as `from_hf`.
        """
        if name in PRESETS:
            return PRESETS[name]
        if not Path(name).exists():
            raise ConfigError(f"model {name!r} is neither a file nor one of {', '.join(PRESETS)}")
        return cls.from_hf(Path(name))

    @classmethod
    def _from_keys(cls, keys: Mapping[str, Any]) -> "FalconConfig":
        fields = hf_config.read(keys)
        rope = fields.pop("rope")
        # Checked before they become arguments, which are annotated with what they should be.
        return cls(**_checked(fields), rope=None if rope is None else Rope(**_checked_rope(rope)))

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers 5.x and 4.x load with this meaning.

        `from_hf(config.to_hf()) == config`. No "dtype" key: the weights decide that.
        """
        return hf_config.write(self)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); expected a Hugging Face config.json") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(f"is not JSON ({error}); expected a Hugging Face config.json") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"holds a {type(keys).__name__}; expected a JSON object of configuration keys")
    return keys


def _checked_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Rope with every number in range and every float a float (JSON writes 10000.0 as 10000)."""
    checked = dict(fields)
    _require_one_of("rope scaling (rope_type)", fields.get("scaling", "default"), get_args(RopeScaling))
    bounds = {"theta": {"above": 1.0}, "factor": {"at_least": 1.0}}
    for name in ("theta", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        optional = name in ("attention_factor", "mscale", "mscale_all_dim")
        if name in fields and not (optional and fields[name] is None):
            shown = "rope theta (rope_theta)" if name == "theta" else f"rope {name}"
            checked[name] = require_number(shown, fields[name], **bounds.get(name, {"above": 0.0}))
    require_flag("rope truncate", fields.get("truncate", True))
    if fields.get("original_max_tokens") is not None:
        shown = "rope original_max_tokens (original_max_position_embeddings)"
        require_whole(shown, fields["original_max_tokens"], at_least=1)
    return checked


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a FalconConfig, each by itself in range, every float a float; `rope` is not looked at."""
    checked = dict(fields)
    for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", "max_tokens"):
        require_whole(hf_config.label(name), fields[name], at_least=1)
    require_whole("num_norms", fields["num_norms"], at_least=1)
    _require_one_of("num_norms", fields["num_norms"], (1, 2))
    _require_one_of("positions", fields["positions"], get_args(Positions))
    _require_one_of("block", fields["block"], get_args(Block))
    for name in ("bias", "tie_word_embeddings"):
        require_flag(name, fields[name])
    for name, bounds in (
        ("norm_epsilon", {"above": 0.0}),
        ("initializer_range", {"at_least": 0.0}),
        ("hidden_dropout", {"at_least": 0.0, "below": 1.0}),
        ("attention_dropout", {"at_least": 0.0, "below": 1.0}),
    ):
        checked[name] = require_number(hf_config.label(name), fields[name], **bounds)
    for name in ("bos_token_id", "pad_token_id"):
        if fields[name] is not None:
            require_whole(name, fields[name], at_least=0)
    if not isinstance(fields["eos_token_ids"], tuple):
        raise ConfigError(f"eos_token_ids is {fields['eos_token_ids']!r}; it must be a tuple of token ids")
    for token_id in fields["eos_token_ids"]:
        require_whole(f"a token id in {hf_config.label('eos_token_ids')}", token_id, at_least=0)
    return checked


def _require_one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; it must be {' or '.join(str(one) for one in known)}")


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


# In Falcon's own vocabulary id 11 is <|endoftext|>, which begins and ends a text; RW-1B has another one.
_FALCON_TEXT = {"vocab_size": 65024, "bos_token_id": 11, "eos_token_ids": (11,)}

# Source: the published config.json of each; falcon-40b-alibi is the multi-query, ALiBi form of the 40B.
PRESETS: dict[str, FalconConfig] = {
    "falcon-rw-1b": FalconConfig(
        vocab_size=50304,
        width=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=8192,
        positions="alibi",
        block="sequential",
        num_norms=2,
        bias=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    "falcon-rw-7b": FalconConfig(
        **_FALCON_TEXT,
        width=4096,
        num_layers=36,
        num_heads=64,
        num_kv_heads=64,
        mlp_width=16384,
        positions="alibi",
        block="sequential",
        num_norms=2,
        bias=True,
    ),
    "falcon-7b": FalconConfig(
        **_FALCON_TEXT,
        width=4544,
        num_layers=32,
        num_heads=71,
        num_kv_heads=1,
        mlp_width=18176,
        positions="rope",
        rope=Rope(),
        block="parallel",
        num_norms=1,
    ),
    "falcon-40b": FalconConfig(
        **_FALCON_TEXT,
        width=8192,
        num_layers=60,
        num_heads=128,
        num_kv_heads=8,
        mlp_width=32768,
        positions="rope",
        rope=Rope(),
        block="parallel",
        num_norms=2,
    ),
    "falcon-180b": FalconConfig(
        **_FALCON_TEXT,
        width=14848,
        num_layers=80,
        num_heads=232,
        num_kv_heads=8,
        mlp_width=59392,
        positions="rope",
        rope=Rope(),
        block="parallel",
        num_norms=2,
    ),
    "falcon2-11b": FalconConfig(
        **_FALCON_TEXT,
        width=4096,
        num_layers=60,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=16384,
        positions="rope",
        rope=Rope(theta=500042.0),
        block="parallel",
        num_norms=1,
        tie_word_embeddings=False,
        max_tokens=8192,
    ),
    "falcon-40b-alibi": FalconConfig(
        **_FALCON_TEXT,
        width=8192,
        num_layers=60,
        num_heads=64,
        num_kv_heads=1,
        mlp_width=32768,
        positions="alibi",
        block="parallel",
        num_norms=1,
    ),
    "falcon-nano": FalconConfig(
        vocab_size=8192,
        width=384,
        num_layers=8,
        num_heads=6,
        num_kv_heads=1,
        mlp_width=1536,
        positions="alibi",
        block="parallel",
        num_norms=1,
        bos_token_id=0,
        eos_token_ids=(0,),
    ),
}
