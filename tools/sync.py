"""Keep what is generated in step with the notebooks.

    python tools/sync.py check    exit 1 and name the files, if rcic_fastai/, docs/, README.md or the sidebar
                                  differ from what the notebooks give; changes nothing
    python tools/sync.py docs     write docs/, README.md and the sidebar
    python tools/sync.py lib      write rcic_fastai/, and drop modules that no notebook makes

All is made in a scratch copy, so an interrupted run leaves the project as it was.
"""
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

import docs as pages

ROOT = Path(__file__).resolve().parent.parent
LIB = 'rcic_fastai'


def scratch_copy(folder):
    "Copy all that the generated files are made from, and of the library only what no notebook makes."
    project = folder/'project'
    skip = shutil.ignore_patterns('_proc', '.ipynb_checkpoints', '__pycache__')
    for name in ('nbs', 'tools', f'{LIB}/tables'): shutil.copytree(ROOT/name, project/name, symlinks=True, ignore=skip)
    for name in ('index.ipynb', 'pyproject.toml', 'settings.ini', f'{LIB}/__init__.py'):
        shutil.copy(ROOT/name, project/name)
    return project


def run(project, what, *command):
    env = {**os.environ, 'PYTHONPATH': str(project), 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONHASHSEED': '0'}
    done = subprocess.run(command, cwd=project, env=env)
    if done.returncode: raise SystemExit(f'sync: {what} failed, see above.')


def export(project): run(project, 'the export', sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')


def build_pages(project, out):
    run(project, 'building the pages', sys.executable, '-W', 'ignore', 'tools/docs.py', str(project), str(out))


def files(folder, pattern='*'):
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob(pattern))
            if p.is_file() and '__pycache__' not in p.parts}


def differences(made, here, name):
    "One line for each file that is not as the notebooks make it."
    lines = [f'{name}{f} is missing' for f in made.keys() - here.keys()]
    lines += [f'{name}{f} comes from no notebook' for f in here.keys() - made.keys()]
    lines += [f'{name}{f} differs' for f in made.keys() & here.keys() if made[f].read_bytes() != here[f].read_bytes()]
    return sorted(lines)


def check_record(record):
    "What the committed pages were built from and contain, by checksum."
    sources, outputs = pages.sources(ROOT), pages.outputs(ROOT/'docs')
    lines = [f'docs/ was built before {f} changed' for f in sorted(sources.keys() | record['sources'].keys())
             if sources.get(f) != record['sources'].get(f)]
    return lines + [f'docs/{f} differs' for f in sorted(outputs.keys() | record['pages'].keys())
                    if outputs.get(f) != record['pages'].get(f)]


def check_docs(project, folder):
    "Build again and compare; with other versions of the tools, compare checksums instead."
    stored = ROOT/'docs'/'build.json'
    if not stored.exists(): return ['docs/build.json is missing']
    record, versions = json.loads(stored.read_text(encoding='utf-8')), pages.tool_versions()
    other = [f'{name} {versions[name]} (was {record["tools"].get(name)})' for name in versions
             if versions[name] != record['tools'].get(name)]
    if other:
        print(f"sync: docs/ was built with other versions, so it is checked by checksum: {', '.join(other)}")
        made = folder/'out'
        (made/'nbs').mkdir(parents=True)
        nbs = pages.notebooks(project)
        (made/'README.md').write_text(pages.readme(nbs[0]), encoding='utf-8')
        (made/'nbs'/'sidebar.yml').write_text(pages.sidebar(nbs), encoding='utf-8')
        lines = check_record(record)
    else:
        build_pages(project, folder/'out')
        lines = differences(files(folder/'out'/'docs'), files(ROOT/'docs'), 'docs/')
    return lines + [f'{f} differs' for f in ('README.md', 'nbs/sidebar.yml')
                    if not (ROOT/f).exists() or (ROOT/f).read_bytes() != (folder/'out'/f).read_bytes()]


def check():
    with tempfile.TemporaryDirectory(prefix='sync-') as folder:
        folder = Path(folder).resolve()
        project = scratch_copy(folder)
        export(project)
        lines = differences(files(project/LIB, '*.py'), files(ROOT/LIB, '*.py'), f'{LIB}/')
        lines += check_docs(project, folder)
    for line in lines: print('sync:', line)
    if not lines: return print(f'sync: {LIB}/, docs/ and README.md are what the notebooks give.')
    raise SystemExit('sync: out of step with the notebooks; run `make lib docs`, look at what changed, and commit it.')


def replace(made, here):
    "Put one folder in place of another."
    old = here.with_name(here.name + '.old')
    if here.exists(): here.rename(old)
    shutil.move(made, here)
    shutil.rmtree(old, ignore_errors=True)


def write_docs():
    with tempfile.TemporaryDirectory(prefix='sync-') as folder:
        folder = Path(folder).resolve()
        project = scratch_copy(folder)
        export(project)
        build_pages(project, folder/'out')
        replace(folder/'out'/'docs', ROOT/'docs')
        for f in ('README.md', 'nbs/sidebar.yml'): shutil.copyfile(folder/'out'/f, ROOT/f)
    print(f"docs: wrote README.md and {len(list((ROOT/'docs').glob('*.html')))} pages, begin at docs/index.html")


def write_lib():
    with tempfile.TemporaryDirectory(prefix='sync-') as folder:
        project = scratch_copy(Path(folder).resolve())
        export(project)
        made, here = files(project/LIB, '*.py'), files(ROOT/LIB, '*.py')
        for f in here.keys() - made.keys(): here[f].unlink()
        for f in made:
            (ROOT/LIB/f).parent.mkdir(exist_ok=True)
            if f not in here or made[f].read_bytes() != here[f].read_bytes(): shutil.copyfile(made[f], ROOT/LIB/f)
    print(f'lib: {LIB}/ has {len(made)} modules')


if __name__ == '__main__':
    commands = dict(check=check, docs=write_docs, lib=write_lib)
    if len(sys.argv) != 2 or sys.argv[1] not in commands: raise SystemExit(__doc__)
    commands[sys.argv[1]]()
