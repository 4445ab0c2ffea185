"""What every section of a configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a configuration: what is not a setting is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
