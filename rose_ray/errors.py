"""Every error that rose_ray raises on purpose.

::

    RoseError
    ├── ConfigError          a key, value or combination in the YAML is wrong
    ├── DataError            an input file or row is wrong
    │   ├── RowError         one row; carries a machine-readable ``reason``
    │   ├── EmptyFileError   a file without one record
    │   └── PairError        preference pairs; the message lists their ids
    ├── StoreError           something in the workspace is wrong
    │   ├── AlteredFileError     a file differs from its receipt
    │   ├── NewerFormatError     written by a later version of rose_ray
    │   ├── LeaseError           another run holds the workspace, or took it over
    │   └── SpaceMismatchError   features and bank live in different spaces
    ├── ModelError           base model, tokenizer, template or adapter does not fit
    ├── NumericsError        a number that cannot be used
    │   ├── NonFiniteError       NaN or infinity
    │   └── ShapeError           tensor shapes disagree
    ├── JudgeError           a judge gives no usable verdict
    │   └── TokenBudgetError     what it may cost is spent
    ├── ResourceError        the cluster cannot give what was asked for
    └── AccountingError      rows went missing or appeared from nowhere

Messages say what was found, where, what was expected and what to do next. All of them take the message as
their only positional argument, so they survive pickling between processes.
"""


class RoseError(Exception):
    """Root of the tree. The command line prints it without a traceback and exits with 1."""


class ConfigError(RoseError, ValueError):
    """The configuration cannot be used as it is."""


class DataError(RoseError, ValueError):
    """An input file cannot be used as it is."""


class RowError(DataError):
    """One row cannot be used. Ingest turns it into a line of the rejected table.

    Args:
        reason: Short stable identifier such as ``not_json`` (lower case, underscores).
        detail: What was found and what was expected.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class EmptyFileError(DataError):
    """An input file holds no record."""


class PairError(DataError):
    """Preference pairs cannot be used; the message lists their ids."""


class StoreError(RoseError, RuntimeError):
    """Something stored in the workspace cannot be used."""


class AlteredFileError(StoreError):
    """A stored file differs in size or digest from its receipt."""


class NewerFormatError(StoreError):
    """The workspace was written by a later version of rose_ray."""


class LeaseError(StoreError):
    """Another run holds the workspace, or took it over from this one, or nothing can keep two runs apart on it."""


class SpaceMismatchError(StoreError):
    """Features and bank were made with different weights, layout or projection."""


class ModelError(RoseError, ValueError):
    """Base model, tokenizer, template or adapter does not fit what was asked."""


class NumericsError(RoseError, ArithmeticError):
    """A computed number cannot be used."""


class NonFiniteError(NumericsError):
    """NaN or infinity where a finite number is needed."""


class ShapeError(NumericsError):
    """Tensor shapes disagree."""


class JudgeError(RoseError, RuntimeError):
    """A judge cannot be reached, or what it says is no verdict."""


class TokenBudgetError(JudgeError):
    """A judge's token budget is spent; what was judged is kept."""


class ResourceError(RoseError, RuntimeError):
    """The cluster cannot give what was asked for."""


class AccountingError(RoseError, RuntimeError):
    """Row counts do not add up."""
