"""The tables of the fleet's database. What they mean together, and all access to them, is in `fleet.store`."""

from sqlalchemy import ForeignKey, ForeignKeyConstraint, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

SCHEMA = 1
"""Grows with each change to this module; the file carries it as its user_version."""


class Base(DeclarativeBase):
    """Of all tables."""


class DeviceRow(Base):
    """A device: its last birth and what it last said."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(primary_key=True)
    profile: Mapped[str] = mapped_column(default="")
    version: Mapped[str] = mapped_column(default="")
    platform: Mapped[str] = mapped_column(default="")
    address: Mapped[str] = mapped_column(default="")
    session: Mapped[int] = mapped_column(default=0)
    serial: Mapped[int] = mapped_column(default=0)
    ended: Mapped[bool] = mapped_column(default=False)
    """Whether the session's will has come."""
    online: Mapped[bool] = mapped_column(default=False)
    last_seen_unix_ms: Mapped[int] = mapped_column(default=0)
    trust: Mapped[str] = mapped_column(default="")
    bytes_fetched: Mapped[int] = mapped_column(default=0)
    bytes_refetched: Mapped[int] = mapped_column(default=0)
    commands: Mapped[int] = mapped_column(default=0)
    """Serial of the last command to it."""
    models: Mapped[list["ModelRow"]] = relationship(cascade="all, delete-orphan", order_by="ModelRow.model")
    assigned: Mapped[list["AssignmentRow"]] = relationship(cascade="all, delete-orphan", order_by="AssignmentRow.model")


class ModelRow(Base):
    """One model on one device, as the device reports it."""

    __tablename__ = "models"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    running: Mapped[int]
    running_manifest: Mapped[str]
    target: Mapped[int]
    phase: Mapped[str]
    reason: Mapped[str]
    bytes_done: Mapped[int]
    bytes_total: Mapped[int]
    failed: Mapped[int]


class ReleaseRow(Base):
    """A published release."""

    __tablename__ = "releases"
    model: Mapped[str] = mapped_column(primary_key=True)
    counter: Mapped[int] = mapped_column(primary_key=True)
    manifest_sha256: Mapped[str]
    manifest_bytes: Mapped[int]
    bytes: Mapped[int]
    published_unix_ms: Mapped[int]
    guarantee: Mapped[str]
    blobs: Mapped[list["BlobRow"]] = relationship(cascade="all, delete-orphan")


class BlobRow(Base):
    """A file of a published release: devices may ask for these digests and for no others."""

    __tablename__ = "blobs"
    model: Mapped[str] = mapped_column(primary_key=True)
    counter: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(primary_key=True, index=True)
    bytes: Mapped[int]
    __table_args__ = (ForeignKeyConstraint(["model", "counter"], ["releases.model", "releases.counter"]),)


class AssignmentRow(Base):
    """Which release of a model a device is to run."""

    __tablename__ = "assignments"
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    counter: Mapped[int]
    release: Mapped[ReleaseRow] = relationship()
    __table_args__ = (ForeignKeyConstraint(["model", "counter"], ["releases.model", "releases.counter"]),)


class SampleRow(Base):
    """A training sample as the device sent it; `id` is the order of arrival."""

    __tablename__ = "samples"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    model: Mapped[str]
    digest: Mapped[str]
    device: Mapped[str]
    size: Mapped[int]
    content: Mapped[bytes]
    __table_args__ = (UniqueConstraint("model", "digest"), {"sqlite_autoincrement": True})
