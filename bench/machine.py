"What a figure was measured on: stored with every result."
import json, os, platform, subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent/'results'
PACKAGES = ['rcic_fastai', 'fastai', 'torch', 'torchvision', 'timm', 'faiss-cpu', 'numpy', 'pandas',
            'opencv-python-headless', 'kornia_rs', 'Pillow', 'zarr', 'numcodecs', 'tensorstore']


def cpu_model() -> str:
    "Name of the processor, as the operating system gives it"
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'): return line.split(':', 1)[1].strip()
    if platform.system() == 'Darwin':
        command = ['sysctl', '-n', 'machdep.cpu.brand_string']
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    "Cores that this process may use"
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def memory_gb() -> float|None:
    "Main memory, 10⁹ bytes"
    try: return round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9, 1)
    except (ValueError, OSError): return None


def versions() -> dict:
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        try: found[name] = version(name)
        except PackageNotFoundError: found[name] = None
    return found


def machine() -> dict:
    return dict(cpu=cpu_model(), cores=cores(), memory_gb=memory_gb(),
                system=f'{platform.system()} {platform.machine()}', versions=versions())


def save(
    name:str, # file name in bench/results, without `.json`
    **figures # what was measured, with units in the names
) -> Path:
    "Store figures with the machine they were measured on"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS/f'{name}.json'
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps({**figures, 'machine': machine()}, indent=1) + '\n')
    os.replace(temporary, path)
    print(f'stored {path.relative_to(RESULTS.parent.parent)}')
    return path


if __name__ == '__main__': print(json.dumps(machine(), indent=1))
