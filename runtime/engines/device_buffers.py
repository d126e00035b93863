"""One execution context of an engine at one batch size, with all that a run needs allocated beforehand."""

import contextlib
import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hflow_rt.errors import BackendUnavailable, EngineMismatch
from hflow_rt.manifest import Tensor
from hflow_rt.runtime.engines.cuda import Cuda
from hflow_rt.runtime.engines.engine import Calls

__all__ = ["Lane"]

_FLOAT = 4  # bytes


class Lane:
    """A context, its stream and its buffers. One caller at a time, with the GPU current in its thread.

    capture: replay the work as a CUDA graph from the second run on. messages: where TensorRT's logger puts errors.
    Raises `EngineMismatch` where the context refuses the batch size, `BackendUnavailable` where memory is short.
    """

    def __init__(
        self,
        cuda: Cuda,
        context: Any,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        batch: int,
        capture: bool,
        messages: Sequence[str],
    ) -> None:
        self._cuda, self._context, self.batch = cuda, context, batch
        self._inputs, self._outputs, self._messages = inputs, outputs, messages
        self._capture, self._graph, self._warm = capture, 0, False
        self._stream = 0
        self._device: dict[str, int] = {}
        self._pinned: dict[tuple[str, int], int] = {}
        self._staging: dict[tuple[str, int], NDArray[np.float32]] = {}
        try:
            self._stream = cuda.stream()
            self._bind()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Outputs for at most `batch` rows: numpy arrays of numpy arrays, else torch tensors of tensors on this GPU."""
        if isinstance(inputs[0], np.ndarray):
            return self._run_arrays(inputs)
        return self._run_tensors(inputs)

    def close(self) -> None:
        """Give everything back. The GPU must be current. Raises nothing: after some errors a GPU refuses all calls."""
        cuda, ignored = self._cuda, contextlib.suppress(BackendUnavailable)
        if self._stream:
            with ignored:
                cuda.synchronize(self._stream)
        if self._graph:
            with ignored:
                cuda.destroy_graph(self._graph)
        self._context = None
        for address in self._device.values():
            with ignored:
                cuda.free(address)
        self._staging.clear()
        for address in self._pinned.values():
            with ignored:
                cuda.free_host(address)
        if self._stream:
            with ignored:
                cuda.destroy_stream(self._stream)
        self._device, self._pinned, self._stream, self._graph = {}, {}, 0, 0

    def _bind(self) -> None:
        for tensor in self._inputs:
            if not self._context.set_input_shape(tensor.name, tensor.batched(self.batch)):
                raise EngineMismatch(f"the engine refuses a batch of {self.batch} for '{tensor.name}'{self._reason()}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise EngineMismatch(f"the engine cannot take a batch of {self.batch}: {error}") from error
        if missing:
            raise EngineMismatch(f"the engine wants more than it was given: {', '.join(missing)}{self._reason()}")
        for tensor in (*self._inputs, *self._outputs):
            found, wanted = tuple(self._context.get_tensor_shape(tensor.name)), tensor.batched(self.batch)
            if found != wanted:
                raise EngineMismatch(f"'{tensor.name}' of the engine must be {list(wanted)}, not {list(found)}")
            self._device[tensor.name] = self._cuda.allocate(self._size(tensor))
            if not self._context.set_tensor_address(tensor.name, self._device[tensor.name]):
                raise EngineMismatch(f"the engine has no '{tensor.name}'{self._reason()}")

    def _size(self, tensor: Tensor, rows: int | None = None) -> int:
        """Bytes, of all its rows or of so many."""
        return _FLOAT * (math.prod(tensor.batched(self.batch)) if rows is None else rows * math.prod(tensor.shape))

    def loop(self, calls: Calls) -> Iterator[dict[str, NDArray[np.float32]]]:
        """As an engine's: what is carried is copied on the device, each row is staged while the call before runs.

        The copy costs a thousandth of a call, and lets one recorded graph serve all of them.
        """
        inputs = {tensor.name: tensor for tensor in self._inputs}
        for name, array in calls.first.items():
            self._fill(inputs[name], array)
            self._upload(inputs[name])
        begun = False
        for index, row in enumerate(calls.rows):
            place = index % 2  # the other one may be on its way still
            for name, array in row.items():
                self._fill(inputs[name], array, place)
            if begun:
                yield self._read([tensor for tensor in self._outputs if tensor.name in calls.every], calls.batch)
            for name in row:
                self._upload(inputs[name], place)
            self._enqueue()
            for left, entered in calls.carry.items():
                self._cuda.copy(self._device[entered], self._device[left], self._size(inputs[entered]), self._stream)
            begun = True
        if begun:
            yield self._read(self._outputs, calls.batch)

    def _stage(self, tensor: Tensor, place: int = 0) -> NDArray[np.float32]:
        """Pinned memory for this tensor, seen as an array; allocated when first needed, for each place."""
        if (tensor.name, place) not in self._staging:
            size = self._size(tensor)
            address = self._pinned[tensor.name, place] = self._cuda.allocate_host(size)
            memory = (ctypes.c_float * (size // _FLOAT)).from_address(address)
            self._staging[tensor.name, place] = np.ctypeslib.as_array(memory).reshape(tensor.batched(self.batch))
        return self._staging[tensor.name, place]

    def _fill(self, tensor: Tensor, array: NDArray[np.float32], place: int = 0) -> None:
        staging = self._stage(tensor, place)
        # rows beyond are padding: any image will do
        staging[: len(array)], staging[len(array) :] = array, array[-1:]

    def _upload(self, tensor: Tensor, place: int = 0) -> None:
        source = self._pinned[tensor.name, place]
        self._cuda.upload(self._device[tensor.name], source, self._size(tensor), self._stream)

    def _read(self, tensors: Iterable[Tensor], count: int) -> dict[str, NDArray[np.float32]]:
        """The first `count` rows of outputs, once all that was queued is done."""
        staged = {}
        for tensor in tensors:
            rows = staged[tensor.name] = self._stage(tensor)[:count]
            source = self._device[tensor.name]
            self._cuda.download(self._pinned[tensor.name, 0], source, rows.nbytes, self._stream)
        self._cuda.synchronize(self._stream)
        return {name: rows.copy() for name, rows in staged.items()}

    def _run_arrays(self, inputs: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        for tensor, array in zip(self._inputs, inputs, strict=True):
            self._fill(tensor, array)
            self._upload(tensor)
        self._enqueue()
        return list(self._read(self._outputs, max(len(array) for array in inputs)).values())

    def _run_tensors(self, inputs: Sequence[Any]) -> list[Any]:
        import torch

        rows, device = max(len(tensor) for tensor in inputs), inputs[0].device
        theirs = torch.cuda.current_stream(device).cuda_stream
        whole = [tensor.contiguous() for tensor in inputs]
        results = [torch.empty((rows, *tensor.shape), device=device) for tensor in self._outputs]
        self._cuda.order(theirs, self._stream)
        for tensor, given in zip(self._inputs, whole, strict=True):
            address, row, last = self._device[tensor.name], self._size(tensor, 1), len(given) - 1
            self._cuda.copy(address, given.data_ptr(), len(given) * row, self._stream)
            for index in range(len(given), tensor.batched(self.batch)[0]):
                self._cuda.copy(address + index * row, given.data_ptr() + last * row, row, self._stream)
        self._enqueue()
        for tensor, result in zip(self._outputs, results, strict=True):
            self._cuda.copy(result.data_ptr(), self._device[tensor.name], self._size(tensor, rows), self._stream)
        # torch may hand on the memory of inputs and results only to work that comes after this
        self._cuda.order(self._stream, theirs)
        return results

    def _enqueue(self) -> None:
        """Queue the work: by the context, or as the graph of it. The first run settles what a graph then repeats."""
        if self._graph:
            self._cuda.launch(self._graph, self._stream)
            return
        if self._capture and self._warm:
            self._cuda.begin_capture(self._stream)
            try:
                self._execute()
            except BaseException:
                with contextlib.suppress(BackendUnavailable):  # that nothing whole was recorded is known
                    self._cuda.destroy_graph(self._cuda.end_capture(self._stream))
                raise
            self._graph = self._cuda.end_capture(self._stream)
            self._cuda.launch(self._graph, self._stream)
            return
        self._execute()
        self._warm = True

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            hint = "; try --no-cuda-graph" if self._capture and self._warm else ""
            raise BackendUnavailable(f"the TensorRT engine failed at batch {self.batch}{self._reason()}{hint}")

    def _reason(self) -> str:
        return f": {self._messages[-1]}" if self._messages else ""
