"""A model's interface as messages of the Open Inference Protocol, both ways, and as Triton's model configuration."""

from collections.abc import Iterable

from hedgerow.proto import oip_pb2
from hedgerow.tensors import DTYPES, ModelMetadata, TensorSpec


def metadata_from_proto(message: oip_pb2.ModelMetadataResponse) -> ModelMetadata:
    """The model's interface in `message`."""

    def specs(tensors: Iterable[oip_pb2.ModelMetadataResponse.TensorMetadata]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in tensors)

    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=specs(message.inputs),
        outputs=specs(message.outputs),
        properties=dict(message.properties),
    )


def metadata_to_proto(metadata: ModelMetadata) -> oip_pb2.ModelMetadataResponse:
    """The message for a model's interface."""
    spec_message = oip_pb2.ModelMetadataResponse.TensorMetadata
    return oip_pb2.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[spec_message(name=s.name, datatype=s.datatype, shape=s.shape) for s in metadata.inputs],
        outputs=[spec_message(name=s.name, datatype=s.datatype, shape=s.shape) for s in metadata.outputs],
        properties=metadata.properties,
    )


def config_to_proto(metadata: ModelMetadata) -> oip_pb2.ModelConfig:
    """The part of Triton's model configuration that the interface tells: shapes are whole, batching is not declared."""
    return oip_pb2.ModelConfig(
        name=metadata.name,
        platform=metadata.platform,
        input=[
            oip_pb2.ModelInput(name=s.name, data_type=_config_type(s.datatype), dims=s.shape) for s in metadata.inputs
        ],
        output=[
            oip_pb2.ModelOutput(name=s.name, data_type=_config_type(s.datatype), dims=s.shape) for s in metadata.outputs
        ],
    )


def _config_type(datatype: str) -> str:
    if datatype == "BYTES":
        return "TYPE_STRING"
    return f"TYPE_{datatype}" if datatype in DTYPES else "TYPE_INVALID"
