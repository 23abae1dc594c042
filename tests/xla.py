"""What XLA is told in tests. Imported before jax is."""

from importlib.metadata import version

_IS_OLD = version("jaxlib").startswith("0.10.")
# For `jax.jit(compiler_options=)`: the emitter that users have, where a comparison is as fine as rounding.
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if _IS_OLD else None


def flags(devices: int) -> str:
    """So many fake devices. Tests run small programs once: compiling them is the time, so its level is 0."""
    told = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    # One piece of machine code: a test process has about one core, where pieces cost a tenth more.
    told += " --xla_cpu_parallel_codegen_split_count=1"
    if _IS_OLD:
        # The older emitter of loops compiles three times faster. Later versions end at the flag.
        told += " --xla_cpu_use_fusion_emitters=false"
    return told
