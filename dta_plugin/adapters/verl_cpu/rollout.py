"""A rollout backend for machines without an accelerator: `actor_rollout_ref.rollout.name=hf_cpu`.

A replica is a Ray actor with its own copy of the model. Requests of the agent loop that arrive together are decoded
together. After each update the actor's weights are sent to it, as to every other backend, so that rollouts are sampled
from the current policy.

Promises: real sampling, the sampler's own log-probs (see sampling.py), any agent loop; from a diffusion LM, canvases
(see diffusion_sampling.py). It is for the synchronous trainer and text; what it cannot do (tensor parallelism, adapters
that are not merged) is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import ray
import torch
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar
from verl.utils.fs import copy_to_local
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from dta_plugin.adapters.verl_cpu.diffusion_sampling import diffusion_sampler
from dta_plugin.adapters.verl_cpu.sampling import Request, Sample, sample
from dta_plugin.errors import InvalidInputError

GATHER_SECONDS = 0.02  # how long a request waits for others to be decoded with

Weights = Generator[tuple[str, torch.Tensor], None, None]


class HFServer:
    """The model of one replica and the requests that wait for it."""

    def __init__(self, config: RolloutConfig, model_config: DictConfig, replica_rank: int) -> None:
        disable_progress_bar()  # for new weights at every step
        torch.manual_seed(config.get("seed", 0) + replica_rank)  # verl 0.8 has no seed
        path = copy_to_local(model_config.path)
        self.config = config
        self.sample = diffusion_sampler(config) or sample
        self.steps: int | None = None
        # The actor's weights are on their way: they arrive before the first request.
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path, trust_remote_code=model_config.trust_remote_code),
            dtype=PrecisionType.to_dtype(config.dtype),
            attn_implementation="sdpa",
            trust_remote_code=model_config.trust_remote_code,
        ).eval()
        self.model.generation_config = GenerationConfig()  # requests say how to sample, not the model's folder
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model_config.trust_remote_code)
        self.eos: set[int] = set() if config.ignore_eos else {tokenizer.eos_token_id}
        self.pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.waiting: list[tuple[Request, asyncio.Future[Sample]]] = []
        self.decoding = asyncio.Lock()

    async def ready(self) -> None:
        """Returns when the model exists."""

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        image_data: Any = None,
        video_data: Any = None,
        **_: Any,
    ) -> TokenOutput:
        """Sample from one prompt, together with the others that wait."""
        if image_data or video_data:
            raise InvalidInputError("The CPU rollout got images or videos. It is for text; use vLLM or SGLang.")
        room = self.config.prompt_length + self.config.response_length - len(prompt_ids)
        request = Request.parse(prompt_ids, sampling_params, min(self.config.response_length, room))
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        await asyncio.sleep(GATHER_SECONDS)
        async with self.decoding:
            if not future.done():
                await self._decode_waiting()
        found = future.result()
        return TokenOutput(
            token_ids=found.tokens,
            log_probs=found.logprobs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.steps, **found.extra},
        )

    async def _decode_waiting(self) -> None:
        """Decode what waits, in a thread, so that more requests can arrive; an error is everybody's."""
        batch, self.waiting = self.waiting[: self.config.max_num_seqs], self.waiting[self.config.max_num_seqs :]
        requests = [request for request, _ in batch]
        try:
            samples = await asyncio.to_thread(self.sample, self.model, requests, self.eos, self.pad)
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), found in zip(batch, samples, strict=True):
            future.set_result(found)

    async def load_weights(self, weights: dict[str, torch.Tensor], steps: int | None) -> None:
        """Take over the actor's weights, named as in the model or as in its checkpoints (experts one by one)."""
        async with self.decoding:
            model, found = type(self.model).from_pretrained(
                None,
                config=self.model.config,
                state_dict=weights,
                dtype=self.model.dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            faults = {what: sorted(map(str, names)) for what, names in found.items() if names}
            if faults:
                raise InvalidInputError(f"The actor's weights do not fit the rollout's model: {faults}.")
            model.generation_config = self.model.generation_config
            self.model = model.eval()
            self.steps = steps


class HFReplica(RolloutReplica):
    """Starts the server of a replica. It keeps its weights and cache when told to sleep: there is no GPU to share."""

    async def launch_servers(self) -> None:
        if self.world_size != 1:
            raise InvalidInputError(
                f"The CPU rollout got {self.world_size} ranks per replica. Expected 1: set "
                "actor_rollout_ref.rollout.tensor_model_parallel_size=1 and data_parallel_size=1."
            )
        server_class = ray.remote(HFServer).options(
            name=server_name(self.replica_rank), num_cpus=0, max_concurrency=self.max_concurrency
        )
        server = server_class.remote(self.config, self.model_config, self.replica_rank)
        await server.ready.remote()
        self.servers = [server]
        self._server_handle, self._server_address = server, server_name(self.replica_rank)

    async def sleep(self) -> None:
        pass

    async def wake_up(self) -> None:
        pass


class HFRollout(BaseRollout):
    """The rollout as an actor's process sees it: where new weights go."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, device_mesh: DeviceMesh) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = torch.distributed.get_rank()  # one rank per replica

    async def update_weights(
        self, weights: Weights, wire_format: str = "named_tensors", global_steps: int | None = None, **options: Any
    ) -> None:
        """Send the weights to this rank's server. Reading them is a collective of all actor ranks."""
        if options.get("peft_config") is not None or wire_format != "named_tensors":
            raise InvalidInputError(
                f"The CPU rollout got {wire_format} and the adapter {options.get('peft_config')}. It takes whole "
                "weights: set actor_rollout_ref.model.lora.merge=True and leave checkpoint_engine.backend=naive."
            )
        whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        await ray.get_actor(server_name(self.replica_rank)).load_weights.remote(whole, global_steps)

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass


def server_name(replica_rank: int) -> str:
    """Ray's name of a replica's server."""
    return f"dta_hf_cpu_server_{replica_rank}"
