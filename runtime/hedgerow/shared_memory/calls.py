"""The calls by which regions are registered."""

from hedgerow.errors import NotFound, Unsupported
from hedgerow.identity import Identify
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Call, Handler
from hedgerow.shared_memory.regions import Regions


class SharedMemoryCalls:
    """The calls of OIP's shared memory extensions, over `regions`; None: the server has none, and says so.

    Memory of GPUs is not served.
    """

    def __init__(self, regions: Regions | None, identify: Identify) -> None:
        self._regions = regions
        self._identify = identify

    @property
    def handlers(self) -> dict[str, Handler]:
        """By method."""
        return {
            "SystemSharedMemoryStatus": self.system_status,
            "SystemSharedMemoryRegister": self.system_register,
            "SystemSharedMemoryUnregister": self.system_unregister,
            "CudaSharedMemoryStatus": self.cuda_status,
            "CudaSharedMemoryRegister": self.cuda_register,
            "CudaSharedMemoryUnregister": self.cuda_unregister,
        }

    async def system_status(
        self, request: oip_pb2.SystemSharedMemoryStatusRequest, call: Call
    ) -> oip_pb2.SystemSharedMemoryStatusResponse:
        """One region, or all."""
        told = oip_pb2.SystemSharedMemoryStatusResponse.RegionStatus
        return oip_pb2.SystemSharedMemoryStatusResponse(
            regions={
                one.name: told(name=one.name, key=one.key, offset=one.offset, byte_size=one.byte_size)
                for one in self._allowed(call).status(request.name)
            }
        )

    async def system_register(
        self, request: oip_pb2.SystemSharedMemoryRegisterRequest, call: Call
    ) -> oip_pb2.SystemSharedMemoryRegisterResponse:
        """Register a region."""
        self._allowed(call).register(request.name, request.key, request.offset, request.byte_size)
        return oip_pb2.SystemSharedMemoryRegisterResponse()

    async def system_unregister(
        self, request: oip_pb2.SystemSharedMemoryUnregisterRequest, call: Call
    ) -> oip_pb2.SystemSharedMemoryUnregisterResponse:
        """Forget one region, or all."""
        self._allowed(call).unregister(request.name)
        return oip_pb2.SystemSharedMemoryUnregisterResponse()

    async def cuda_status(
        self, request: oip_pb2.CudaSharedMemoryStatusRequest, _: Call
    ) -> oip_pb2.CudaSharedMemoryStatusResponse:
        """There are none."""
        if request.name:
            raise NotFound(f"there is no CUDA shared memory region {request.name!r}: they are not supported here")
        return oip_pb2.CudaSharedMemoryStatusResponse()

    async def cuda_register(
        self, request: oip_pb2.CudaSharedMemoryRegisterRequest, _: Call
    ) -> oip_pb2.CudaSharedMemoryRegisterResponse:
        """Refused."""
        raise Unsupported(f"CUDA shared memory region {request.name!r}: memory of GPUs is not supported here")

    async def cuda_unregister(
        self, _: oip_pb2.CudaSharedMemoryUnregisterRequest, __: Call
    ) -> oip_pb2.CudaSharedMemoryUnregisterResponse:
        """Nothing to do, and no error: clients do it before anything else."""
        return oip_pb2.CudaSharedMemoryUnregisterResponse()

    def _allowed(self, call: Call) -> Regions:
        self._identify(call)
        if self._regions is None:
            raise Unsupported("this server does not take tensors from shared memory")
        return self._regions
