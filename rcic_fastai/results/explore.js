// The page of rcic_explore: plates, wells, pictures, maps. It reads the JSON of the page, draws on canvases, and asks no address for anything.
'use strict';
(() => {
// ---- small helpers; text from tables only ever becomes a text node
const $ = id => document.getElementById(id);
function el(tag, attrs = {}, ...kids) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v);
    else if (v === true) e.setAttribute(k, '');
    else if (v !== false && v != null) e.setAttribute(k, v);
  }
  e.append(...kids.flat(Infinity).filter(o => o != null));
  return e;
}
const fill = (e, ...kids) => (e.replaceChildren(...kids.flat(Infinity).filter(o => o != null)), e);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function digits(v, n = 3) {                                   // as Python rounds: of two numbers equally near, such as for 5/16, the even one (toFixed takes the larger)
  if (v == null) return '–';
  const all = v.toFixed(100), cut = all.length - 100 + n;     // every digit of the binary number
  const down = all.slice(0, n ? cut : cut - 1);
  return /^50*$/.test(all.slice(cut)) && '02468'.includes(down.at(-1)) ? down : v.toFixed(n);
}
const short = v => v == null ? '–' : String(Number(v.toPrecision(4)));
const share = (a, n) => n ? `${digits(100*(a/n), 0)}%` : '–';
function nameOf(name) {                                         // a name; the middle of a long one is hidden, since its end tells it from others, and a tip has the whole
  const t = [...String(name)];
  return t.length <= 24 ? t.join('') : el('span', {class: 'long'}, el('span', {class: 'start'}, t.slice(0, -8).join('')), t.slice(-8).join(''));
}
const clamp = (v, a, b) => Math.min(b, Math.max(a, v));
const count = (n, one, many) => `${n.toLocaleString('en')} ${n === 1 ? one : many || one + 's'}`;

// ---- what the page holds
const D = JSON.parse($('data').textContent), W = D.wells, N = W.id.length, P = D.predictions, C = D.channels.length;
const columns = Object.fromEntries(W.columns.map(c => [c.name, c]));
const numberOf = new Map(W.id.map((id, i) => [id, i]));
const text = (name, w) => { const c = columns[name]; return !c ? '' : c.kind === 'text' ? c.names[c.codes[w]] ?? '' : short(c.values[w]); };
const truth = w => W.truth[w], label = i => i < 0 || i == null ? '' : D.labels[i];
const kind = w => W.kind[w];                                  // 0 treatment, 1 positive control, 2 negative control
const KINDS = ['treatment', 'positive control', 'negative control'];
for (const p of P) {                                          // by well, −1 where it is not named
  p.at = new Int32Array(N).fill(-1);
  p.wells.forEach((w, i) => { p.at[w] = i; });
}
const sitesOf = Array.from({length: N}, () => []);
D.sites.well.forEach((w, s) => sitesOf[w].push(s));
for (const sp of D.spaces) {                                  // site → its neighbors
  sp.from = new Map();
  sp.near.query.forEach((q, i) => { if (!sp.from.has(q)) sp.from.set(q, []); sp.from.get(q).push(i); });
}
const plateKey = w => `${W.experiment[w]}\t${W.plate[w]}`;
const plates = new Map(), experiments = [];                   // wells of each plate; plates of each experiment
for (let w = 0; w < N; w++) {
  if (W.row[w] < 0) continue;
  const k = plateKey(w);
  if (!plates.has(k)) plates.set(k, {key: k, experiment: W.experiment[w], plate: W.plate[w], wells: [], at: new Map()});
  const p = plates.get(k);
  p.wells.push(w);
  p.at.set(W.row[w]*100 + W.col[w], w);
}
for (const p of plates.values()) {
  let e = experiments.find(o => o.code === p.experiment);
  if (!e) experiments.push(e = {code: p.experiment, name: D.experiments[p.experiment], plates: []});
  e.plates.push(p);
}
const order = new Intl.Collator('en', {numeric: true}).compare;
for (const e of experiments) e.plates.sort((a, b) => order(D.plates[a.plate], D.plates[b.plate]));
const isNamed = e => P.some(p => e.plates.some(o => o.wells.some(w => p.at[w] >= 0)));
for (const e of experiments) e.named = isNamed(e);
experiments.sort((a, b) => b.named - a.named || order(a.name, b.name));
const byName = new Map(experiments.map(e => [e.name, e]));

// colors of Okabe and Ito, which the color-blind tell apart, with a mark where there are more groups than colors
const HUES = ['#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7', '#b8a500'], MARKS = ['', 'dot', 'bar', 'cross', 'ring', 'line', 'tri', 'box'];
const MOST = HUES.length*MARKS.length, GRAY = '#8b949e';

// ---- state, which the address keeps
const VIEWS = {plates: 'Plates', map: 'Map', confusions: 'Confusions', accuracy: 'Accuracy'};
// w: open well; n: pinned well; g: group of the legend; z: box on a map; b: the map beside; ch: channels that are on; t: their colors, black and white
const firstColor = () => {                                    // without a known label nothing is right or wrong: then by what the wells were named
  const p = P[0];
  if (!p) return 'label';
  if (p.wells.some(w => truth(w) >= 0)) return 'result';
  return new Set(p.label).size <= MOST || !p.score ? 'named' : 'score';
};
const fresh = () => ({v: 'plates', p: 0, e: experiments[0]?.name ?? '', c: firstColor(), w: '', n: '', q: '', r: '', f: '', x: '', g: '', z: '', pair: '', m: 'composite', s: 'own', ch: '', t: '', k: 0, b: ''});
let S = fresh(), brush = null;                                // brush: Set of the wells in the box
const FIRST = fresh();
function address() {
  const u = new URLSearchParams();
  for (const [k, v] of Object.entries(S)) if (String(v) !== String(FIRST[k])) u.set(k, v);
  return '#' + u;
}
function read() {
  const u = new URLSearchParams(location.hash.slice(1)), next = fresh();
  for (const k of Object.keys(next)) if (u.has(k)) next[k] = typeof next[k] === 'number' ? Number(u.get(k)) | 0 : u.get(k);
  if (!VIEWS[next.v]) next.v = FIRST.v;
  if (!P[next.p]) next.p = 0;
  if (!byName.has(next.e)) next.e = FIRST.e;
  if (!colorNames().includes(next.c)) next.c = FIRST.c;
  for (const k of ['w', 'n']) if (!numberOf.has(next[k])) next[k] = '';
  if (!columns[next.f]) next.f = next.x = '';
  if (!boxOf(next.z)) next.z = '';
  S = next;
}
const framed = window !== window.top, past = [];              // the address and the history of a notebook are not ours: a page in a frame keeps its own steps
function go(change, isStep = true) {                          // a step can be taken back
  const was = {...S}, from = address();
  Object.assign(S, change);
  if (S.v === 'plates' && !('e' in change) && Object.keys(change).some(k => 'v p q r f x g z pair'.split(' ').includes(k))) toMatch();
  const a = address();
  if (framed) { if (isStep && a !== from) past.push(was); }
  else if (a !== (location.hash || '#')) {
    if (isStep) location.hash = a;
    else try { history.replaceState(history.state, '', a); } catch { /* asked too often: the address stays, the state does not */ }
  }
  show();
}
function goTo(change) {                                       // another state, as it was before
  const were = S.ch + S.t;
  change();
  show();
  if (were !== S.ch + S.t) showWell(true);
}
function back() {
  if (!framed) history.back();
  else if (past.length) goTo(() => { S = past.pop(); });
}
addEventListener('hashchange', () => { if ((location.hash || '#') !== address()) goTo(read); });

// ---- by what wells are colored
// cividis (Nuñez, Anderton and Renslow 2018), nine of its colors
const RAMP = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [98, 101, 111], [125, 124, 120], [154, 149, 119], [187, 174, 107], [221, 203, 86], [254, 232, 56]];
function ramp(t) {
  const x = clamp(t, 0, 1)*(RAMP.length - 1), i = Math.min(Math.floor(x), RAMP.length - 2), f = x - i;
  return `rgb(${RAMP[i].map((a, j) => Math.round(a + f*(RAMP[i + 1][j] - a))).join(',')})`;
}
const OWN = {result: 'right or wrong', label: `${D.target} (label)`, named: `${D.target} (predicted)`, score: 'score', margin: 'margin', votes: 'share of votes'};
function colorNames() { return [...(P.length ? Object.keys(OWN) : ['label']), ...W.columns.map(c => 'column:' + c.name)]; }
const colorTitle = c => OWN[c] ?? c.slice(7);
const result = w => { const p = P[S.p], i = p ? p.at[w] : -1; return i < 0 ? 'none' : truth(w) < 0 ? 'unknown' : p.label[i] === truth(w) ? 'right' : 'wrong'; };
const isJudged = w => ['right', 'wrong'].includes(result(w));
const counts = w => isJudged(w) && !(P[S.p].controls_apart && kind(w));      // controls beside treatments have an accuracy of their own
function tally(wells) {                                       // [right, counted] of some wells
  let right = 0, n = 0;
  for (const w of wells) if (counts(w)) { n++; right += result(w) === 'right'; }
  return [right, n];
}
const controlsSaid = wells => { const c = P[S.p]?.controls_apart ? wells.filter(w => kind(w) && isJudged(w)) : []; return c.length ? ` (controls: ${c.filter(w => result(w) === 'right').length} of ${c.length})` : ''; };
function ranked(codes, names) {                               // groups by size; the largest have a look of their own
  const n = new Map();
  for (const c of codes) if (c >= 0) n.set(c, (n.get(c) ?? 0) + 1);
  const list = [...n.keys()].sort(codes.ordered ? (a, b) => order(names[a], names[b]) : (a, b) => n.get(b) - n.get(a) || order(names[a], names[b]));
  const looks = new Map(list.slice(0, MOST).map((c, i) => [c, {color: HUES[i % HUES.length], mark: MARKS[Math.floor(i/HUES.length)], name: names[c]}]));
  return {groups: looks, more: list.length - looks.size};
}
const isDose = name => /dose|concentration|(?<![a-z])conc(?![a-z])/i.test(name);
let paint = null;                                             // {look(w), groups or numbers} of the current color
function setPaint() {
  const c = S.c, p = P[S.p], none = {color: css('--empty'), mark: '', empty: true};
  if (c === 'result') {
    const looks = {right: {color: css('--good'), mark: '', name: 'right'}, wrong: {color: css('--bad'), mark: 'cross', name: 'wrong'}, unknown: {color: GRAY, mark: 'ring', name: 'named, label not known'}};
    if (!p.wells.some(w => result(w) === 'unknown')) delete looks.unknown;
    paint = {look: w => looks[result(w)] ?? none, code: result, groups: new Map(Object.entries(looks)), more: 0, rest: 'not named'};
    return;
  }
  const column = columns[c.slice(7)], isNumber = ['score', 'margin', 'votes'].includes(c) || column?.kind === 'number';
  if (isNumber) {
    const value = column ? w => column.values[w] : w => { const i = p.at[w]; return i < 0 ? null : p[c]?.[i] ?? null; };
    let lo = Infinity, hi = -Infinity, least = Infinity;
    for (let w = 0; w < N; w++) { const v = value(w); if (v != null) { lo = Math.min(lo, v); hi = Math.max(hi, v); if (v > 0) least = Math.min(least, v); } }
    if (lo > hi) lo = hi = 0;
    const isLog = !!column && (column.log || isDose(column.name)) && lo >= 0 && hi >= 30*least, from = lo > 0 ? 0 : .15;      // doses go in steps of so many times; 0 is below all
    const part = v => isLog ? v > 0 ? from + (1 - from)*Math.log(v/least)/Math.log(hi/least) : 0 : hi > lo ? (v - lo)/(hi - lo) : .5;
    const looks = Array.from({length: 65}, (_, i) => ({color: ramp(i/64), mark: '', edge: true}));
    paint = {look: w => { const v = value(w); return v == null ? none : looks[Math.round(64*part(v))]; }, lo, hi, isLog, value, rest: 'no value'};
    return;
  }
  let code = w => column.codes[w], names = column?.names;
  if (c === 'label') { code = truth; names = D.labels; }
  if (c === 'named') { code = w => p.at[w] < 0 ? -1 : p.label[p.at[w]]; names = D.labels; }
  const codes = Array.from({length: N}, (_, w) => code(w));
  codes.ordered = new Set(codes).size <= MOST;
  const {groups, more} = ranked(codes, names), other = {color: GRAY, mark: '', name: 'others'};
  paint = {look: w => codes[w] < 0 ? none : groups.get(codes[w]) ?? other, code: w => codes[w], groups, more, names, rest: c === 'named' ? 'not named' : 'not known'};
}

// ---- which wells are shown: one filter for all views
let lit = new Uint8Array(N), nLit = N, pick = null;           // pick: the code of the group of the legend that is chosen
const asks = new Uint8Array(N);                               // what passes all other filters: the groups of the legend count it
let words = null, wordsOf = -1;
function hay() {                                              // what a search looks in
  if (wordsOf === S.p) return words;
  wordsOf = S.p;
  const p = P[S.p];
  const texts = W.columns.filter(c => c.kind === 'text'), lined = fields => `\n${fields.join('\n')}\n`.toLowerCase();
  return words = W.id.map((id, w) => {
    const e = D.experiments[W.experiment[w]] ?? '', plate = D.plates[W.plate[w]] ?? '';
    return [lined([id, label(truth(w)), e, plate, plain(plate), `${e}_${plate}`, W.well[w] ?? '', ...texts.map(c => c.names[c.codes[w]] ?? '')]), p && p.at[w] >= 0 ? lined([label(p.label[p.at[w]])]) : ''];
  });
}
const plain = name => String(name).toLowerCase().replace(/^0+(?=\d)/, '');   // 02 is 2
const plateNames = new Set(D.plates.map(plain));
function placeOf(t) {                                         // 'b9', 'b09' and 'aa1' as [row, column]; null for what is no place on these plates
  const m = /^([a-z]{1,2})0*([1-9]\d?)$/.exec(t);
  if (!m) return null;
  const row = [...m[1]].reduce((n, c) => 26*n + c.charCodeAt(0) - 96, 0) - 1, col = Number(m[2]) - 1;
  return row < shape[0] && col < shape[1] ? [row, col] : null;
}
function asked(tokens) {                                      // of each word, whether a well has it: in what it is, or in how it was named (both as text in lines)
  const tests = [];
  for (let i = 0; i < tokens.length; i++) {
    const t = tokens[i], next = tokens[i + 1], at = placeOf(t);
    if (t === 'plate' && next != null && (plateNames.has(plain(next)) || /^\d+$/.test(next))) { i++; tests.push((_, w) => plain(D.plates[W.plate[w]] ?? '') === plain(next)); }
    else if (t === 'plate' && next == null) tests.push((text, w) => W.row[w] >= 0 || text.includes(t));     // its number is still being typed
    else if (t === 'well' && next != null && placeOf(next)) continue;
    else if (at) {                                            // a place, or a name that is this word: p21, and no other that holds it
      const whole = new RegExp(`(?<![\\p{L}\\p{N}])${t}(?![\\p{L}\\p{N}])`, 'u');
      tests.push((text, w) => W.row[w] === at[0] && W.col[w] === at[1] || whole.test(text));
    }
    else if (/^\d+$/.test(t)) tests.push(text => text.includes(`\n${t}\n`));     // a number is a plate or a whole name: nearly every id holds its digits
    else tests.push(text => text.includes(t));
  }
  return tests;
}
let found = null;                                             // of a search: [what it counted, wells that are it, wells that were only named so]
function search() {                                           // what a well is for the search: 2 it is so, 1 it was only named so, 0 neither; null without one
  const q = S.q.trim().toLowerCase(), tokens = q.split(/\s+/).filter(Boolean), p = P[S.p];
  if (!q) return null;
  const exact = D.labels.flatMap((l, i) => l.toLowerCase() === q ? [i] : []);      // the whole name of a perturbation is no part of others
  if (exact.length) {
    const is = new Set(exact);
    return {name: D.labels[exact[0]], of: w => is.has(truth(w)) ? 2 : p && p.at[w] >= 0 && is.has(p.label[p.at[w]]) ? 1 : 0};
  }
  const h = hay(), tests = asked(tokens);
  return {name: '', of: w => tests.every(t => t(h[w][0], w)) ? 2 : tests.every(t => t(h[w][0], w) || t(h[w][1], w)) ? 1 : 0};
}
function setFilter() {
  const s = search(), p = P[S.p], col = columns[S.f], pair = S.pair ? S.pair.split('\t') : null;
  nLit = 0;
  found = s && [s.name, 0, 0];
  for (let w = 0; w < N; w++) {
    const i = p ? p.at[w] : -1, is = s ? s.of(w) : 2;
    const ok = is && (!S.r || result(w) === S.r) && (!col || S.x === '' || text(S.f, w) === S.x)
      && (!pair || i >= 0 && label(truth(w)) === pair[0] && (pair.length < 2 || label(p.label[i]) === pair[1]))
      && (!brush || brush.has(w));
    asks[w] = ok ? 1 : 0;
    lit[w] = ok && (pick == null || paint.code?.(w) === pick) ? 1 : 0;
    nLit += lit[w];
    if (s && lit[w]) found[3 - is]++;
  }
}
const controlsShown = () => { const n = W.kind.reduce((n, k, w) => n + (k && lit[w] ? 1 : 0), 0); return !n || n === nLit ? n ? `, ${n === 1 ? 'a control' : 'all controls'}` : '' : `, ${n.toLocaleString('en')} of them ${n === 1 ? 'a control' : 'controls'}`; };
const are = n => n === 1 ? 'is' : 'are';
const foundSaid = () => !found ? '' : found[0] ? `: ${found[1].toLocaleString('en')} ${are(found[1])} ${found[0]}, ${found[2].toLocaleString('en')} more named so`
  : found[2] ? `: ${found[1].toLocaleString('en')} by what they are, ${found[2].toLocaleString('en')} only as named` : '';
const nothingSaid = () => `Nothing found for “${S.q.trim()}”${S.r || S.f && S.x !== '' || S.pair || brush || pick != null ? ' among the wells of the other filters' : ''}`;
const isFiltered = () => S.q || S.r || S.f && S.x !== '' || S.pair || brush || pick != null;

// ---- stamps: a well as a small picture, drawn once for each look and size
const stamps = new Map();
function stamp(look, shape, r, dim, ratio) {
  const key = `${look.color}|${look.mark}|${shape}|${r}|${dim}|${ratio}|${look.empty ?? ''}${look.edge ?? ''}`;
  let s = stamps.get(key);
  if (s) return s;
  if (stamps.size > 4000) stamps.clear();
  const size = Math.ceil(2*r + 2), c = document.createElement('canvas');
  c.width = c.height = Math.ceil(size*ratio);
  const g = c.getContext('2d');
  g.scale(ratio, ratio);
  g.translate(size/2, size/2);
  if (dim) g.globalAlpha = .16;
  g.beginPath();
  if (shape === 1) { g.moveTo(0, -r); g.lineTo(r, 0); g.lineTo(0, r); g.lineTo(-r, 0); g.closePath(); }
  else if (shape === 2) g.rect(-.82*r, -.82*r, 1.64*r, 1.64*r);
  else g.arc(0, 0, r, 0, 7);
  g.fillStyle = look.color;
  g.fill();
  if (look.empty || look.edge) { g.strokeStyle = css('--hole'); g.lineWidth = .8; g.stroke(); }
  drawMark(g, look.mark, r);
  stamps.set(key, c);
  return c;
}
function drawMark(g, mark, r) {
  if (!mark) return;
  const a = .45*r;
  g.strokeStyle = g.fillStyle = '#fff';
  g.lineWidth = Math.max(1, .28*r);
  g.beginPath();
  if (mark === 'dot') { g.arc(0, 0, .36*r, 0, 7); g.fill(); }
  else if (mark === 'box') g.fillRect(-.36*r, -.36*r, .72*r, .72*r);
  else if (mark === 'tri') { g.moveTo(0, -a); g.lineTo(a, .8*a); g.lineTo(-a, .8*a); g.closePath(); g.fill(); }
  else {
    if (mark === 'bar') { g.moveTo(-a, 0); g.lineTo(a, 0); }
    if (mark === 'line') { g.moveTo(0, -a); g.lineTo(0, a); }
    if (mark === 'cross') { g.moveTo(-a, -a); g.lineTo(a, a); g.moveTo(a, -a); g.lineTo(-a, a); }
    if (mark === 'ring') g.arc(0, 0, .42*r, 0, 7);
    g.stroke();
  }
}
let isPaper = false;                                          // when printed, all is drawn as wide as a page and in light colors
const widthOf = canvas => isPaper ? 1000 : canvas.clientWidth || 300, ratioNow = () => isPaper ? 2 : Math.min(devicePixelRatio || 1, 3);
function fit(canvas, h) {                                     // canvas as wide as its place; [context, width, height, ratio]
  const w = widthOf(canvas), ratio = ratioNow();
  const [cw, ch] = [Math.round(w*ratio), Math.round(h*ratio)];
  if (canvas.width !== cw || canvas.height !== ch) { canvas.width = cw; canvas.height = ch; }
  canvas.style.height = `${h}px`;
  const g = canvas.getContext('2d');
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.clearRect(0, 0, w, h);
  return [g, w, h, ratio];
}

// ---- a well in words
function describe(w) {
  const p = P[S.p], i = p ? p.at[w] : -1, said = [W.id[w]];
  if (kind(w)) said.push(KINDS[kind(w)]);
  if (truth(w) >= 0) said.push(label(truth(w)));
  if (i >= 0) said.push(`named ${label(p.label[i])}` + (truth(w) < 0 ? '' : result(w) === 'right' ? ', right' : ', wrong'));
  if (paint.value) said.push(`${colorTitle(S.c)} ${short(paint.value(w))}`);
  else if (S.c.startsWith('column:')) said.push(`${colorTitle(S.c)} ${text(S.c.slice(7), w) || 'not known'}`);
  return said;
}
const say = s => { $('said').textContent = s; };
let still = null;                                             // where the pointer was pressed: until it leaves that place, no tip
function tipText(said, x, y) {
  const t = $('tip');
  t.hidden = !said;
  if (!said) return;
  t.textContent = said;
  t.style.left = `${clamp(x + 14, 4, Math.max(4, innerWidth - t.offsetWidth - 4))}px`;
  t.style.top = `${y + 18 + t.offsetHeight > innerHeight ? y - t.offsetHeight - 10 : y + 18}px`;
}
function tip(w, x, y) {
  if (w != null && still && Math.hypot(x - still[0], y - still[1]) < 4) w = null;
  if (w != null) still = null;
  tipText(w == null ? '' : describe(w).join('\n'), x, y);
}
function nameTip(ev) {                                        // the whole of long names: of what is pointed at, or of the row of a button that has the focus
  const near = s => ev.target.closest?.(s), at = ev.type === 'focusin' ? near('tr') ?? near('button') : near('.long') ?? near('button');
  const names = at?.matches('.long') ? [at] : [...at?.querySelectorAll('.long') ?? []];
  if (!names.length || !at.isConnected || ev.type === 'focusin' && !ev.target.matches(':focus-visible')) return;
  const box = names[0].getBoundingClientRect();
  tipText(names.map(e => e.textContent).join('\n'), box.left, box.bottom - 14);
}
for (const type of ['pointerover', 'focusin', 'click']) document.addEventListener(type, nameTip);
for (const type of ['pointerout', 'focusout']) document.addEventListener(type, ev => { if (ev.target.closest?.('.long,button,tr')) tip(null); });

// ---- gestures on a canvas: drag, two fingers, wheel, two clicks
let pressed = null, isSecond = false;                         // the last press on such a canvas: two at one place show all of it
addEventListener('pointerdown', ev => {
  still = [ev.clientX, ev.clientY];
  tip(null);
  isSecond = !!pressed && ev.timeStamp - pressed.t < 400 && Math.hypot(ev.clientX - pressed.x, ev.clientY - pressed.y) < (ev.pointerType === 'mouse' ? 6 : 24) && ev.isPrimary && pressed.on.isMoved();
  if (isSecond) { pressed.on.reset(); clearTimeout(pressed.waiting); }
  pressed = null;
}, true);
function gestures(canvas, on) {                               // on: at(ev, reach) → well, zoom(f, x, y), pan(dx, dy), reset(), isMoved(), takesWheel(ev), and for boxes press and release
  const down = new Map(), place = (x, y) => { const b = canvas.getBoundingClientRect(); return [x - b.left, y - b.top]; };
  const spread = () => { const [a, b] = [...down.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  let moved = 0, apart = 0, isMouse = true, mine = null;
  canvas.addEventListener('pointerdown', ev => {
    canvas.setPointerCapture(ev.pointerId);
    down.set(ev.pointerId, {x: ev.clientX, y: ev.clientY});
    isMouse = ev.pointerType === 'mouse';
    moved = isSecond || down.size > 1 ? Infinity : 0;
    mine = pressed = {t: ev.timeStamp, x: ev.clientX, y: ev.clientY, on};
    on.press?.(ev, ...place(ev.clientX, ev.clientY), down.size > 1);
    if (down.size === 2) apart = spread();
  });
  canvas.addEventListener('pointermove', ev => {
    const p = down.get(ev.pointerId);
    if (!p) { if (ev.pointerType === 'mouse') tip(on.at(ev, 12), ev.clientX, ev.clientY); return; }
    const dx = ev.clientX - p.x, dy = ev.clientY - p.y;
    moved += Math.abs(dx) + Math.abs(dy);
    down.set(ev.pointerId, {x: ev.clientX, y: ev.clientY});
    if (down.size === 2) {
      const now = spread(), [a, b] = [...down.values()];
      on.zoom(now/(apart || now), ...place((a.x + b.x)/2, (a.y + b.y)/2));
      apart = now;
    }
    on.pan(dx/down.size, dy/down.size);
    tip(null);
  });
  const up = ev => {
    if (!down.delete(ev.pointerId)) return;
    on.release?.(moved > 6 && ev.type === 'pointerup');
    if (ev.type === 'pointercancel') moved = Infinity;
    if (moved > 6) pressed = null;                            // a drag is no click
  };
  canvas.addEventListener('pointerup', up);
  canvas.addEventListener('pointercancel', up);
  canvas.addEventListener('pointerleave', () => tip(null));
  canvas.addEventListener('click', ev => {
    const w = moved > 6 ? null : on.at(ev, isMouse ? 12 : 24);
    if (w == null) return;
    if (isMouse || !on.isMoved()) on.open(w);
    else mine.waiting = setTimeout(() => on.open(w), 400);    // a well may cover a narrow screen: first see whether a second tap comes
  });
  const two = ev => { if (ev.touches.length > 1) ev.preventDefault(); };       // one finger may scroll the page; two are for the canvas
  for (const type of ['touchstart', 'touchmove']) canvas.addEventListener(type, two, {passive: false});
  canvas.addEventListener('wheel', ev => {
    if (!on.takesWheel(ev)) return;
    ev.preventDefault();
    on.zoom(Math.exp(-ev.deltaY*(ev.deltaMode ? 33 : 1)*(ev.ctrlKey ? .004 : .0015)), ...place(ev.clientX, ev.clientY));
  }, {passive: false});
}

// ---- plates
let cursor = null;                                            // {plate, row, col} of the keyboard
const shape = D.shape;
function plateGeometry(width, {view} = {}) {                   // x, y: where the first well begins; of a plate that is zoomed, left of and above what is seen
  const left = shape[0] > 26 ? 24 : 18, top = 14, least = (width - left - 2)/shape[1], {k, x, y} = view ?? {k: 1, x: 0, y: 0};
  return {left, top, step: k*least, x: left + x*least*shape[1], y: top + y*least*shape[0], height: top + least*shape[0] + 2, least};
}
function movePlate(canvas, plate, f, dx = 0, dy = 0, cx = null, cy = null) {      // zoom by f around a place, and move by pixels; its view is in widths and heights of the whole plate
  const geo = plateGeometry(widthOf(canvas), plate), wide = geo.least*shape[1], high = geo.least*shape[0];
  const {k, x, y} = plate.view ?? {k: 1, x: 0, y: 0}, next = clamp(k*f, 1, 12), q = next/k;
  const a = cx == null ? .5 : (cx - geo.left)/wide, b = cy == null ? .5 : (cy - geo.top)/high;
  plate.view = next < 1.001 ? null : {k: next, x: clamp(a + (x - a)*q + dx/wide, 1 - next, 0), y: clamp(b + (y - b)*q + dy/high, 1 - next, 0)};
  canvas.classList.toggle('zoomed', !!plate.view);
  drawPlate(canvas, plate);
}
const rowName = r => r < 26 ? String.fromCharCode(65 + r) : String.fromCharCode(64 + Math.floor(r/26)) + String.fromCharCode(65 + r % 26);
function drawBase(g, plate, geo, ratio) {                     // the plate without what is open or under the cursor
  g.font = `${clamp(.55*geo.step, 7, 12)}px system-ui,sans-serif`;
  g.fillStyle = css('--soft');
  g.textAlign = 'center';
  g.textBaseline = 'middle';
  const every = geo.step < 11 ? 4 : geo.step < 17 ? 2 : 1;
  const wide = geo.least*shape[1], high = geo.least*shape[0];
  within(g, geo.left, 0, wide, geo.top, () => { for (let c = 0; c < shape[1]; c += every) g.fillText(String(c + 1), geo.x + (c + .5)*geo.step, geo.top/2); });
  within(g, 0, geo.top, geo.left, high, () => { for (let r = 0; r < shape[0]; r += geo.step < 9 ? 2 : 1) g.fillText(rowName(r), geo.left/2, geo.y + (r + .5)*geo.step); });
  within(g, geo.left, geo.top, wide, high, () => drawWells(g, plate, geo, ratio));
}
function within(g, x, y, w, h, draw) { g.save(); g.beginPath(); g.rect(x, y, w, h); g.clip(); draw(); g.restore(); }
function drawWells(g, plate, geo, ratio) {
  const r = Math.max(1.2, .43*geo.step);
  g.fillStyle = css('--hole');
  for (let row = 0; row < shape[0]; row++) for (let col = 0; col < shape[1]; col++) {
    const x = geo.x + (col + .5)*geo.step, y = geo.y + (row + .5)*geo.step, w = plate.at.get(row*100 + col);
    if (w == null) { g.globalAlpha = .6; g.fillRect(x - .9, y - .9, 1.8, 1.8); g.globalAlpha = 1; continue; }
    const s = stamp(paint.look(w), kind(w), r, !lit[w], ratio), size = s.width/ratio;
    g.drawImage(s, x - size/2, y - size/2, size, size);
  }
}
function drawPlate(canvas, plate) {
  const geo = plateGeometry(widthOf(canvas), plate), [g, width, , ratio] = fit(canvas, geo.height), key = `${drawn}|${width}|${ratio}|${Object.values(plate.view ?? {})}`;
  if (plate.key2 !== key) {
    plate.key2 = key;
    plate.base = document.createElement('canvas');
    plate.base.width = canvas.width;
    plate.base.height = canvas.height;
    const b = plate.base.getContext('2d');
    b.scale(ratio, ratio);
    drawBase(b, plate, geo, ratio);
  }
  g.drawImage(plate.base, 0, 0, canvas.width/ratio, canvas.height/ratio);
  const ring = (row, col, color, wide) => {
    g.strokeStyle = color;
    g.lineWidth = wide;
    g.strokeRect(geo.x + col*geo.step + .5, geo.y + row*geo.step + .5, geo.step - 1, geo.step - 1);
  };
  within(g, geo.left - 2, geo.top - 2, geo.least*shape[1] + 4, geo.least*shape[0] + 4, () => {
    for (const w of [S.n, S.w].map(id => numberOf.get(id))) if (w != null && plate.key === plateKey(w)) ring(W.row[w], W.col[w], css('--fg'), 2.2);
    if (cursor?.plate === plate && document.activeElement === canvas) ring(cursor.row, cursor.col, css('--accent'), 2);
  });
}
function wellAt(canvas, plate, ev) {
  const box = canvas.getBoundingClientRect(), geo = plateGeometry(canvas.clientWidth, plate), x = ev.clientX - box.left, y = ev.clientY - box.top;
  const col = Math.floor((x - geo.x)/geo.step), row = Math.floor((y - geo.y)/geo.step);
  return x < geo.left || y < geo.top ? undefined : plate.at.get(row*100 + col);
}
function fitPlates(root, n) {                                 // as large as possible, all plates in view where that leaves them readable
  const W0 = root.clientWidth, H0 = Math.max(innerHeight - root.getBoundingClientRect().top - scrollY - 40, 300), ratio = shape[1]/(shape[0] + 2.6);
  let best = [0, 1];
  for (let k = 1; k <= n; k++) { const width = Math.min((W0 - 20*(k - 1))/k, ratio*(H0/Math.ceil(n/k))); if (width > best[0]) best = [width, k]; }
  const least = Math.min(W0, 16*shape[1] + 20);
  if (best[0] < least) { const k = Math.min(n, Math.max(1, Math.floor((W0 + 20)/(least + 20)))); best = [Math.min((W0 - 20*(k - 1))/k, 28*shape[1]), k]; }
  root.style.gridTemplateColumns = `repeat(${best[1]},minmax(0,${Math.floor(best[0])}px))`;
}
let canvases = [];                                            // of the plates shown: [canvas, plate, caption]
function nextWell(plate, [down, right]) {                     // in this direction of the cursor: the next of its line, else the nearest of other lines
  let best = null, least = Infinity;
  for (const w of plate.wells) {
    const [r, c] = [W.row[w] - cursor.row, W.col[w] - cursor.col], along = r*down + c*right, aside = Math.abs(r*right) + Math.abs(c*down);
    const cost = along + aside + (aside ? 1000 : 0);
    if (along > 0 && cost < least) { least = cost; best = w; }
  }
  return best;
}
function plateKeys(ev, canvas, plate) {
  const f = {'+': 1.4, '=': 1.4, '-': 1/1.4, 0: 0}[ev.key];
  if (f != null) { movePlate(canvas, plate, f); ev.preventDefault(); return; }
  const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[ev.key];
  if (!cursor || cursor.plate !== plate) cursor = {plate, row: W.row[plate.wells[0]], col: W.col[plate.wells[0]]};
  if (ev.key === 'Enter' || ev.key === ' ') {
    const w = plate.at.get(cursor.row*100 + cursor.col);
    if (w != null) openWell(w, true);
    ev.preventDefault();
    return;
  }
  if (ev.key === 'Home' || ev.key === 'End') { const row = plate.wells.filter(w => W.row[w] === cursor.row).map(w => W.col[w]); if (row.length) cursor.col = ev.key === 'Home' ? Math.min(...row) : Math.max(...row); }
  else if (!move) return;
  else {
    const w = nextWell(plate, move);
    if (w != null) cursor = {plate, row: W.row[w], col: W.col[w]};
  }
  ev.preventDefault();
  toCursor(canvas, plate);
  const w = plate.at.get(cursor.row*100 + cursor.col), box = canvas.getBoundingClientRect(), geo = plateGeometry(canvas.clientWidth, plate);
  say(w == null ? `${rowName(cursor.row)}${String(cursor.col + 1).padStart(2, '0')}, no well` : describe(w).join(', '));
  still = null;
  tip(w, box.left + geo.x + (cursor.col + .5)*geo.step, box.top + geo.y + (cursor.row + .5)*geo.step);
}
function toCursor(canvas, plate) {                            // a plate that is zoomed moves until the well under the cursor is seen
  const geo = plateGeometry(canvas.clientWidth, plate), inside = (at, from, size) => clamp(at, from, from + size - geo.step) - at;
  movePlate(canvas, plate, 1, inside(geo.x + cursor.col*geo.step, geo.left, geo.least*shape[1]), inside(geo.y + cursor.row*geo.step, geo.top, geo.least*shape[0]));
}
const notKnown = wells => wells.filter(w => result(w) === 'unknown').length;
function plateCaption(plate) {
  const [right, n] = tally(plate.wells), u = notKnown(plate.wells);
  const parts = [`Plate ${D.plates[plate.plate]} of ${D.experiments[plate.experiment]}`, n ? `${right} of ${n} right${controlsSaid(plate.wells)}` : u ? `${u} of ${count(plate.wells.length, 'well')} named` : count(plate.wells.length, 'well')];
  if (isFiltered()) parts.push(`${plate.wells.filter(w => lit[w]).length} shown`);
  return parts.join(' · ');
}
function elsewhere() {                                        // where the wells are that are shown, when this experiment has none of them
  if (!nLit) return S.q.trim() ? nothingSaid() + '.' : 'No well is shown: choose another filter, or show all.';
  const at = experiments.map(o => [o.name, o.plates.reduce((n, p) => n + p.wells.filter(w => lit[w]).length, 0)]).filter(([, n]) => n), most = 6;
  if (!at.length) return `None of the ${count(nLit, 'well')} that are shown has a place on a plate: look at the map.`;
  return ['No well of this experiment is shown. ', at.slice(0, most).map(([name, n]) => [el('button', {type: 'button', onclick: () => { go({e: name}); $('experiment').focus(); }}, `${count(n, 'well')} in ${name}: show`), ' ']), at.length > most ? `and in ${count(at.length - most, 'more experiment')}` : null];
}
let platesOf = null;
const zoomButtons = zoom => [['+', 'Zoom in', 1.4], ['−', 'Zoom out', 1/1.4], ['All', 'Show all', 0]].map(([text, name, f]) =>      // of plates and maps; 0 shows all
  el('button', {type: 'button', 'aria-label': name, title: 'Two fingers and the wheel zoom, two clicks show all; over plates the wheel may need Ctrl', onclick: () => zoom(f)}, text));
function experimentSaid(wells) {                              // how the wells of an experiment were named
  if (!P.length) return 'This page holds no predictions.';
  const [right, n] = tally(wells), u = notKnown(wells), more = u ? `${count(u, n ? 'more well' : 'well')} named, labels not known` : '', {protocol} = P[S.p];
  if (n) return `${right} of ${n} wells right (${share(right, n)})${controlsSaid(wells)}, ${protocol}` + (more && `; ${more}`);
  return (u ? `${more}${controlsSaid(wells)}, ${protocol}` : controlsSaid(wells) ? `only controls were named${controlsSaid(wells)}, ${protocol}` : 'no well was named');
}
function showPlates() {
  const e = byName.get(S.e), root = $('plates');
  if (!e) { fill(root, el('p', {class: 'none'}, 'No well of this screen has a place on a plate.')); return; }
  if (platesOf !== e) {
    platesOf = e;
    const i = experiments.indexOf(e), step = d => () => go({e: experiments[(i + d + experiments.length) % experiments.length].name});
    const select = el('select', {id: 'experiment', onchange: ev => go({e: ev.target.value})}, experiments.map(o => el('option', {value: o.name}, o.name + (o.named ? '' : ' (not predicted)'))));
    select.value = e.name;
    canvases = e.plates.map(plate => {
      const name = `Plate ${D.plates[plate.plate]} of ${e.name}`;
      const canvas = el('canvas', {tabindex: 0, role: 'application', 'aria-roledescription': 'plate', 'aria-label': `${name}: arrow keys move between wells, Enter opens one, plus and minus zoom, 0 shows all`, class: plate.view ? 'zoomed' : ''});
      gestures(canvas, {
        at: ev => wellAt(canvas, plate, ev), open: w => { cursor = {plate, row: W.row[w], col: W.col[w]}; openWell(w); }, isMoved: () => !!plate.view,
        zoom: (f, x, y) => movePlate(canvas, plate, f, 0, 0, x, y), pan: (dx, dy) => movePlate(canvas, plate, 1, dx, dy), reset: () => movePlate(canvas, plate, 0),
        takesWheel: ev => ev.ctrlKey || plate.view || document.documentElement.scrollHeight <= innerHeight,       // otherwise the wheel scrolls the page
      });
      canvas.addEventListener('keydown', ev => plateKeys(ev, canvas, plate));
      canvas.addEventListener('focus', () => { cursor ??= {plate, row: W.row[plate.wells[0]], col: W.col[plate.wells[0]]}; drawPlate(canvas, plate); });
      canvas.addEventListener('blur', () => { tip(null); drawPlate(canvas, plate); });
      return [canvas, plate, el('figcaption')];
    });
    fill(root, el('div', {class: 'row'}, el('button', {type: 'button', 'aria-label': 'Previous experiment', onclick: step(-1)}, '‹'),
      el('label', {}, el('span', {class: 'unseen'}, 'Experiment'), select), el('button', {type: 'button', 'aria-label': 'Next experiment', onclick: step(1)}, '›'), zoomButtons(f => canvases.forEach(([canvas, plate]) => movePlate(canvas, plate, f))), el('span', {class: 'soft', id: 'experiment-said'})), el('p', {class: 'none', id: 'elsewhere', hidden: true}),
      el('div', {class: 'plates'}, canvases.map(([canvas, , caption]) => el('figure', {class: 'plate'}, caption, canvas))));
  }
  $('experiment-said').textContent = experimentSaid(e.plates.flatMap(p => p.wells));
  const here = isFiltered() ? e.plates.reduce((n, p) => n + p.wells.filter(w => lit[w]).length, 0) : 1;
  $('elsewhere').hidden = here > 0;
  fill($('elsewhere'), here ? null : elsewhere());
  fitPlates(root.querySelector('.plates'), e.plates.length);
  for (const [canvas, plate, caption] of canvases) { caption.textContent = plateCaption(plate); drawPlate(canvas, plate); }
}

// ---- pictures: one gray picture per site, its channels side by side, decoded when they are looked at
let lines = null;
const readLines = () => { lines ??= $('pictures').textContent.split('\n'); };
const FILES = D.pictures.files, arrived = new Map();          // of a folder: number of the first picture of each file; file → its pictures
window.rcicPictures = (k, texts) => arrived.set(k, texts);    // what a file of pictures calls
function loadFile(k) {                                        // a script, since a page from the file system may read no other file
  return new Promise((done, fail) => {
    const s = el('script', {src: `pictures/${String(k).padStart(5, '0')}.js`, onload: () => { s.remove(); done(arrived.get(k)); }, onerror: () => { s.remove(); fail(new Error('absent')); }});
    document.head.append(s);
  });
}
const files = new Map();
function fileOf(k) {
  if (!files.has(k)) {
    files.set(k, loadFile(k));
    files.get(k).catch(() => files.delete(k)).finally(() => arrived.delete(k));
    if (files.size > 80) files.delete(files.keys().next().value);
  }
  return files.get(k);
}
async function base64Of(at) {                                 // a picture, of the page or of its file
  if (!FILES.length) { readLines(); return lines[at]; }
  let a = 0, b = FILES.length - 1;
  while (a < b) { const m = (a + b + 1) >> 1; if (FILES[m] <= at) a = m; else b = m - 1; }
  return (await fileOf(a))[at - FILES[a]];
}
const decoded = new Map();
let scratch = null;
async function planes(site) {
  const at = D.sites.picture[site];
  if (at < 0) return null;
  if (decoded.has(at)) return decoded.get(at);
  const job = (async () => {
    const raw = atob(await base64Of(at)), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const bitmap = await createImageBitmap(new Blob([bytes], {type: D.pictures.type})), {width: w, height: h} = bitmap;
    scratch ??= document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    if (scratch.canvas.width !== w || scratch.canvas.height !== h) Object.assign(scratch.canvas, {width: w, height: h});
    scratch.drawImage(bitmap, 0, 0);
    bitmap.close();
    const px = new Uint32Array(scratch.getImageData(0, 0, w, h).data.buffer), [sh, sw] = D.pictures.cell, cols = D.pictures.columns, out = [];
    for (let k = 0; k < C; k++) {
      const x0 = (k % cols)*sw, y0 = Math.floor(k/cols)*sh, plane = new Uint8Array(sh*sw);
      for (let y = 0, to = 0, from = y0*w + x0; y < sh; y++, from += w) for (let x = 0; x < sw; x++) plane[to++] = px[from + x] & 255;
      out.push(plane);
    }
    return out;
  })();
  decoded.set(at, job);
  job.catch(() => decoded.delete(at));
  if (decoded.size > 300) decoded.delete(decoded.keys().next().value);
  return job;
}
const hexOf = c => '#' + c.map(v => Math.round(255*v).toString(16).padStart(2, '0')).join('');
const tune = D.channels.map((name, k) => ({name, on: true, color: hexOf(D.colors[k]), lo: 0, hi: 100}));   // as the channels are shown
function tunedText() {                                        // channels that look otherwise than at first, as text for the address
  return tune.map((t, k) => t.color === hexOf(D.colors[k]) && t.lo === 0 && t.hi === 100 ? '' : `${k}-${t.color.slice(1)}-${t.lo}-${t.hi}`).filter(Boolean).join('.');
}
function setTune() {                                          // channels as the address says
  const own = new Map(S.t.split('.').map(o => o.match(/^(\d+)-([0-9a-f]{6})-(\d{1,3})-(\d{1,3})$/)).filter(Boolean).map(m => [Number(m[1]), m]));
  tune.forEach((t, k) => { const m = own.get(k); Object.assign(t, {on: S.ch[k] !== '0', color: m ? '#' + m[2] : hexOf(D.colors[k]), hi: m ? clamp(m[4], 1, 100) : 100}); t.lo = m ? Math.min(m[3], t.hi - 1) : 0; });
}
const HOWS = {composite: 'composite', '3d': '3D + 3D', panels: 'one panel per channel'};
const SCALES = {own: 'its picture', plate: 'the plate', screen: 'the screen'};
function lookup(site, k) {                                    // stored byte → share of the scale, 0…1
  const lo = D.sites.lo[site*C + k], hi = D.sites.hi[site*C + k], [a, b] = limits(site, k), out = new Float32Array(256), t = tune[k];
  const from = t.lo/100, to = Math.max(t.hi/100, from + .01);
  for (let v = 0; v < 256; v++) { const x = b > a ? (lo + v/255*(hi - lo) - a)/(b - a) : 0; out[v] = clamp((x - from)/(to - from), 0, 1); }
  return out;
}
const bright = Float32Array.from({length: 1025}, (_, i) => (i/1024)**.8);
function compose(px, plane, luts, use) {                      // the color of the strongest stains, the brightness of the strongest, as rgb_composite does
  const n = plane[0].length, rgb = use.map(k => [1, 3, 5].map(i => parseInt(tune[k].color.slice(i, i + 2), 16)));
  const cube = luts.map(l => l.map(v => v*v*v));
  const used = use.map(k => plane[k]), m = use.length;
  for (let i = 0; i < n; i++) {
    let r = 0, g = 0, b = 0, sum = 0, top = 0;
    for (let j = 0; j < m; j++) {
      const v = used[j][i], w = cube[j][v], s = luts[j][v], c = rgb[j];
      r += w*c[0]; g += w*c[1]; b += w*c[2];
      sum += w;
      if (s > top) top = s;
    }
    const f = sum > 0 ? bright[(1024*top + .5) | 0]/sum : 0;
    px[4*i] = r*f; px[4*i + 1] = g*f; px[4*i + 2] = b*f; px[4*i + 3] = 255;
  }
}
async function drawSite(canvas, site, how) {
  const [h, w] = D.pictures.cell;
  let plane;
  try { plane = await planes(site); } catch { canvas.replaceWith(el('p', {class: 'none'}, 'This picture cannot be read: the folder “pictures” must stay beside the page, as it was written.')); }
  if (!plane) return false;
  const paste = (fillIn, x, y) => { const im = g.createImageData(w, h); fillIn(im.data); g.putImageData(im, x, y); };
  const size = (cw, ch) => { canvas.width = cw; canvas.height = ch; return canvas.getContext('2d'); };
  const luts = D.channels.map((_, k) => lookup(site, k)), gap = Math.max(1, w >> 6);
  let g;
  if (how === 'composite') {
    const use = tune.map((t, k) => t.on ? k : -1).filter(k => k >= 0);
    g = size(w, h);
    paste(px => compose(px, plane, use.map(k => luts[k]), use), 0, 0);
  } else if (how === '3d') {
    const n = Math.ceil(C/3);
    g = size(n*w + (n - 1)*gap, h);
    for (let j = 0; j < n; j++) paste(px => {
      for (let i = 0; i < w*h; i++) {
        for (let c = 0; c < 3; c++) { const k = 3*j + c; px[4*i + c] = k < C && tune[k].on ? 255*luts[k][plane[k][i]] : 0; }
        px[4*i + 3] = 255;
      }
    }, j*(w + gap), 0);
  } else {
    g = size(w, h);
    const k = Number(how);
    paste(px => { for (let i = 0; i < w*h; i++) { px[4*i] = px[4*i + 1] = px[4*i + 2] = 255*luts[k][plane[k][i]]; px[4*i + 3] = 255; } }, 0, 0);
  }
  return true;
}
function limits(site, k) {
  if (S.s === 'screen') return [D.scales.screen[0][k], D.scales.screen[1][k]];
  if (S.s === 'plate') { const p = D.scales.plate[D.sites.scale[site]]; return [p[0][k], p[1][k]]; }
  const sites = together.includes(site) ? together : [site];          // two wells that are compared have one scale
  return [Math.min(...sites.map(s => D.sites.lo[s*C + k])), Math.max(...sites.map(s => D.sites.hi[s*C + k]))];
}
let together = [];                                            // sites of the pinned and of the open well, when they stand beside each other
let drawings = [];                                            // [canvas, site, how, is a neighbor] of the open well
async function redraw() {                                     // its own pictures first
  if ($('all-off')) $('all-off').textContent = S.m !== 'panels' && tune.every(t => !t.on) ? 'All channels are off.' : '';
  for (const late of [false, true]) {
    await Promise.all(drawings.filter(d => d[3] === late).map(([c, s, how]) => drawSite(c, s, how ?? S.m)));
    if (!late) $('well').dataset.own = S.w;
  }
}
function picture(site, how, alt, late = false) {
  const canvas = el('canvas', {role: 'img', 'aria-label': alt});
  drawings.push([canvas, site, how, late]);
  return canvas;
}
const noPicture = site => el('p', {class: 'none'}, D.pictures.count ? 'No picture: this well was left out of the page.' : 'This page holds no pictures.');

// ---- the open well
let trail = 0;                                                // steps from the first well that was opened
function openWell(w, focus = false) {
  const e = D.experiments[W.experiment[w]];
  trail = S.w ? trail + 1 : 0;
  go({w: W.id[w], ...(byName.has(e) && S.v === 'plates' ? {e} : {})});
  if (focus || innerWidth <= 960) $('well').querySelector('h2')?.focus();
  say(describe(w).join(', '));
}
function closeWell() {
  const w = numberOf.get(S.w);
  trail = 0;
  go({w: ''});
  const c = w == null ? null : canvases.find(([, p]) => p.key === plateKey(w));
  if (S.v === 'plates') c?.[0].focus();
}
function verdict(w) {
  const p = P[S.p], i = p ? p.at[w] : -1;
  if (i < 0) return el('p', {class: 'verdict'}, truth(w) >= 0 ? [`${D.target} `, el('b', {}, label(truth(w)))] : 'label not known', el('span', {class: 'soft'}, P.length ? ' · not named in this prediction' : ''));
  const r = result(w);
  return el('p', {class: 'verdict'}, r === 'unknown' ? 'named ' : '', el('b', {}, label(p.label[i])), ' ',
    r === 'right' ? el('span', {class: 'tag good'}, '✓ right') : r === 'wrong' ? [el('span', {class: 'tag bad'}, '✗ wrong'), ' it is ', el('b', {}, label(truth(w)))] : el('span', {class: 'soft'}, 'label not known'),
    ' ', el('span', {class: 'tag soft', title: p.about}, p.protocol));
}
function facts(w) {
  const skip = new Set(['experiment', 'plate', 'well', 'well_type']), line = rows => el('dl', {class: 'facts'}, rows.filter(([, v]) => v != null && v !== '' && v !== '–').map(([k, v]) => el('div', {}, el('dt', {}, k), el('dd', {}, v))));
  const of = kind => W.columns.filter(c => !skip.has(c.name) && c.kind === kind).map(c => [c.name, text(c.name, w)]), numbers = of('number').filter(([k]) => !isDose(k)), doses = of('number').filter(([k]) => isDose(k));
  return [line([['experiment', D.experiments[W.experiment[w]]], ['plate', D.plates[W.plate[w]]], ['well', W.well[w]], ['kind', KINDS[kind(w)]], ...doses, ...of('text')]),
    numbers.length > 4 ? el('details', {}, el('summary', {}, count(numbers.length, 'number')), line(numbers)) : line(numbers)];
}
function candidates(w) {
  const p = P[S.p], i = p ? p.at[w] : -1;
  if (i < 0 || !p.top.length) return null;
  const list = p.top.map((t, j) => [t[i], p.top_scores[j]?.[i] ?? null]).filter(([t]) => t >= 0);
  const known = list.map(([, s]) => s).filter(s => s != null), isBest = !known.length || list[0][1] == null || list[0][1] >= Math.max(...known) - 1e-4;
  return [el('h3', {}, `The answer, and ${list.length - 1} other candidates`), el('table', {}, el('thead', {}, el('tr', {}, el('th', {}, D.target), known.length ? [el('th', {class: 'n'}, 'cosine'), el('th', {}, '0 … 1')] : null)),
    el('tbody', {}, list.map(([t, s], j) => {
      const bar = el('i');
      bar.style.width = `${s == null ? 0 : clamp(100*s, 0, 100)}%`;
      return el('tr', {}, el('td', {}, t === truth(w) ? el('b', {class: 'good'}, nameOf(label(t)), ' ✓') : nameOf(label(t)), j ? null : el('span', {class: 'soft'}, ' answer')), known.length ? [el('td', {class: 'n'}, digits(s)), el('td', {}, el('span', {class: 'meter', 'aria-hidden': true}, bar))] : null);
    }))), isBest ? null : el('p', {class: 'soft'}, p.protocol === 'transductive' ? 'Another candidate is more similar, but the plate groups, and that each name is on a plate once, decided against it.' : 'Another candidate is more similar, but it was not these cosines alone that decided (see the notes at the end of the page).'), el('p', {class: 'soft'}, [['score', p.score?.[i]], ['margin', p.margin?.[i]], ['votes', p.votes?.[i]]].filter(([, v]) => v != null).map(([k, v]) => k === 'votes' ? `${digits(100*v, 0)}% of neighbors vote for it` : `${k} ${digits(v)}`).join(' · '))];
}
const pictured = w => sitesOf[w].filter(s => D.sites.picture[s] >= 0);
function sitePicture(s, k = null) {                           // a site as the page shows it, or one channel of it
  const name = `Site ${D.sites.name[s]}`, id = W.id[D.sites.well[s]];
  if (k == null) return el('figure', {}, el('figcaption', {class: 'soft'}, name), picture(s, null, `${name} of ${id}, ${HOWS[S.m]}`));
  const [lo, hi] = limits(s, k), c = D.channels[k];
  return el('figure', {}, picture(s, k, `${c}, ${name} of ${id}`), el('figcaption', {class: 'soft'}, `${c} ${digits(lo, 0)}…${digits(hi, 0)}`));
}
function siteParts(w) {
  const mine = pictured(w);
  if (!mine.length) return [noPicture()];
  if (S.m !== 'panels') return [el('div', {class: 'pics' + (S.m === '3d' ? ' wide' : '')}, mine.map(s => sitePicture(s)))];
  return mine.map(s => [el('h3', {}, `Site ${D.sites.name[s]}`), el('div', {class: 'pics'}, D.channels.map((_, k) => sitePicture(s, k)))]).flat();
}
function pairParts(wells) {                                   // the pictures of the pinned and of the open well beside each other, site by site
  const mine = wells.map(pictured), rows = Math.max(1, ...mine.map(s => s.length)), looks = S.m === 'panels' ? D.channels.map((_, k) => k) : [null];
  const row = (i, k) => mine.map(sites => sites[i] != null ? sitePicture(sites[i], k) : i ? el('div') : noPicture());
  return [el('div', {class: 'pics two'}, wells.map((w, i) => el('div', {}, el('b', {}, W.id[w]), el('span', {class: 'soft'}, i ? ' open' : ' pinned'), verdict(w))), Array.from({length: rows}, (_, i) => looks.map(k => row(i, k))))];
}
function controls() {
  const choice = (id, title, all, key) => {
    const s = el('select', {id, onchange: ev => { go({[key]: ev.target.value}, false); showWell(true); }}, Object.entries(all).map(([k, v]) => el('option', {value: k}, v)));
    s.value = S[key];
    return el('label', {}, title + ' ', s);
  };
  const keep = () => go({t: tunedText()}, false);             // when a slider is let go: a browser forgets addresses that change too often
  const slider = (t, end, word) => el('input', {type: 'range', min: 0, max: 100, value: t[end], class: end, 'aria-label': `${t.name}: ${word}, percent of the scale`, onchange: keep, oninput: ev => {
    t[end] = end === 'lo' ? Math.min(ev.target.value, t.hi - 1) : Math.max(ev.target.value, t.lo + 1);     // black stays below white
    ev.target.value = t[end];
    redraw();
  }});
  const rows = tune.map((t, k) => {
    const box = el('input', {type: 'checkbox', onchange: ev => { t.on = ev.target.checked; go({ch: tune.every(o => o.on) ? '' : tune.map(o => o.on ? 1 : 0).join('')}, false); redraw(); }});
    box.checked = t.on;
    return [el('label', {}, box, t.name), el('input', {type: 'color', value: t.color, 'aria-label': `${t.name}: color in the composite`, onchange: keep, oninput: ev => { t.color = ev.target.value; redraw(); }}), slider(t, 'lo', 'black'), slider(t, 'hi', 'white')];
  });
  return [el('div', {class: 'row'}, choice('how', 'Show', C > 1 ? HOWS : {composite: 'picture'}, 'm'), choice('scale', 'Scale of', together.length ? {...SCALES, own: 'both wells'} : SCALES, 's')),
    el('p', {class: 'none', id: 'all-off', role: 'status'}),
    el('details', {id: 'channels', open: channelsOpen, ontoggle: ev => { channelsOpen = ev.target.open; }}, el('summary', {}, 'Channels: on, color, black and white'), el('div', {class: 'channels'}, el('span'), el('span'), el('span', {class: 'soft'}, 'black'), el('span', {class: 'soft hi'}, 'white'), rows),
      el('button', {type: 'button', onclick: () => { go({ch: '', t: ''}, false); showWell(true); }}, 'As they were'))];
}
let channelsOpen = false;
function neighbors(w) {
  const p = P[S.p], sp = p ? D.spaces[p.space] : D.spaces[0], i = p ? p.at[w] : -1;
  if (!sp) return null;
  const mine = sitesOf[w].filter(s => sp.from.has(s));
  if (!mine.length) return [el('h3', {}, 'Nearest neighbors'), el('p', {class: 'soft'}, 'None are known: this well was not embedded for this prediction, or the index has no other experiment.')];
  const about = i >= 0 ? `Training sites that are most similar (cosine of the ${sp.name} embedding); a vote is a neighbor with the predicted name.`
    : `Its most similar training sites in other experiments (cosine of the ${sp.name} embedding). This is no prediction.`;
  return [el('h3', {}, 'Nearest neighbors'), el('p', {class: 'soft'}, about), mine.map(s => [mine.length > 1 || D.sites.name[s] !== '' ? el('h3', {}, `of site ${D.sites.name[s]}`) : null,
    el('div', {class: 'near'}, sp.from.get(s).map(j => neighborCard(w, sp, j)))]).flat()];
}
function neighborCard(w, sp, j) {
  const s = sp.near.site[j], o = D.sites.well[s], p = P[S.p], i = p ? p.at[w] : -1, name = label(truth(o));
  const isVote = i >= 0 ? p.label[i] === truth(o) : truth(w) === truth(o), isTrue = truth(w) >= 0 && truth(o) === truth(w);
  const parts = [`${D.experiments[W.experiment[o]]} · plate ${D.plates[W.plate[o]]} · ${W.well[o]}${D.sites.name[s] === '' || D.sites.name[s] == null ? '' : ` · site ${D.sites.name[s]}`}`, `cosine ${digits(sp.near.cosine[j])}`];
  const vote = i >= 0 ? (isVote ? 'votes for it' : 'another name') : isVote ? 'same label' : 'another label';
  const unseen = t => el('span', {class: 'unseen'}, t);          // a button is called by what stands on it
  return el('button', {type: 'button', onclick: () => openWell(o, true)},
    D.sites.picture[s] >= 0 ? picture(s, 'composite', `Neighbor ${W.id[o]}`, true) : el('div', {class: 'none'}, 'no picture'),
    el('div', {class: 'name ' + (isTrue ? 'good' : '')}, name || '?', isTrue ? [el('span', {'aria-hidden': 'true'}, ' ✓'), unseen(', the label of this well')] : null), el('div', {class: 'soft'}, parts[0]), el('div', {}, parts[1]), el('div', {class: isVote ? '' : 'soft'}, vote), unseen('open this well'));
}
let shownWell = '';
function showWell(again = false) {
  const root = $('well'), w = numberOf.get(S.w), key = `${S.w}|${S.n}|${S.p}|${S.m}|${S.s}`, pinned = numberOf.get(S.n), isPair = pinned != null && pinned !== w;
  root.hidden = w == null;
  if (w == null) { shownWell = ''; drawings = []; return; }
  if (key === shownWell && !again) return;
  const top = shownWell.startsWith(S.w + '|') ? root.scrollTop : 0, focus = root.contains(document.activeElement) ? document.activeElement.id : '';
  shownWell = key;
  drawings = [];
  together = isPair ? [pinned, w].flatMap(pictured) : [];
  root.classList.toggle('two', isPair);
  const isPinned = pinned === w, pin = C ? el('button', {type: 'button', id: 'pin', 'aria-pressed': String(isPinned), onclick: () => go({n: isPinned ? '' : S.w}, false)}, isPinned ? 'Pinned' : isPair ? 'Pin this one' : 'Pin to compare') : null;
  fill(root, el('div', {class: 'head'}, trail > 0 ? el('button', {type: 'button', id: 'back', onclick: () => { trail--; back(); }}, '← back') : null, el('h2', {tabindex: -1}, W.id[w]), pin,
    el('button', {type: 'button', id: 'close', 'aria-label': 'Close the well', onclick: closeWell}, '✕')),
    isPinned ? el('p', {class: 'none'}, 'Pinned: open another well, or one of its neighbors, and both stand beside each other.') : null,
    isPair ? [controls(), pairParts([pinned, w]), facts(w)] : [verdict(w), facts(w), C ? controls() : null, siteParts(w)], candidates(w), neighbors(w));
  root.scrollTop = top;
  if (focus) $(focus)?.focus();
  root.dataset.ready = root.dataset.own = '';
  redraw().then(() => { if (shownWell === key) root.dataset.ready = S.w; });
}

// ---- the map of embeddings, and another one of the same wells beside it
const panes = ['map-canvas', 'beside-canvas'].map(id => ({id, map: null, k: 1, x: 0, y: 0, marks: [], sheet: null, box: null}));
let frame = 0, mapOf = '', select = false;
const spaceNumber = () => P[S.p]?.space ?? 0, space = () => D.spaces[spaceNumber()];
function unit(m) {                                            // the map with its points in 0…1, as large as fits
  if (!m || m.unit) return m;
  let [a, b, c, d] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < m.x.length; i++) { a = Math.min(a, m.x[i]); b = Math.max(b, m.x[i]); c = Math.min(c, m.y[i]); d = Math.max(d, m.y[i]); }
  const s = Math.max(b - a, d - c) || 1;
  m.unit = {x: Float32Array.from(m.x, v => (v - (a + b)/2)/s), y: Float32Array.from(m.y, v => -(v - (c + d)/2)/s)};
  return m;
}
const mapNamed = key => { const [i, k] = key.split('.'); return unit(D.spaces[i]?.maps[k]); };      // by numbers of a space and its map
function besideKey() {                                        // of the map that is shown beside; before a correction, if nothing was chosen
  if (S.b === 'no' || S.b === `${spaceNumber()}.${S.k}`) return '';
  if (S.b && mapNamed(S.b)) return S.b;
  const k = space()?.maps.findIndex(m => m.before === S.k) ?? -1;
  return k < 0 ? '' : `${spaceNumber()}.${k}`;
}
const mapTitle = key => { const sp = D.spaces[key.split('.')[0]]; return `${D.spaces.length > 1 ? `${sp.name}: ` : ''}${mapNamed(key).name}`; };
function boxOf(text) {                                        // 'space.map,x0,y0,x1,y1' as [map, …numbers]; null for anything else
  const [key, ...at] = text.split(','), m = key && mapNamed(key), box = at.map(Number);
  return m && box.length === 4 && box.every(Number.isFinite) ? [m, ...box] : null;
}
const wellsIn = ([m, x0, y0, x1, y1]) => new Set(m.wells.filter((_, i) => m.unit.x[i] >= x0 && m.unit.x[i] <= x1 && m.unit.y[i] >= y0 && m.unit.y[i] <= y1));
const scaleOf = (pane, w, h) => .92*Math.min(w, h)*pane.k;
function toScreen(pane, i, w, h) { const s = scaleOf(pane, w, h); return [w/2 + pane.map.unit.x[i]*s + pane.x, h/2 + pane.map.unit.y[i]*s + pane.y]; }
function mapHeight(canvas) { return isPaper ? 800 : clamp(innerHeight - canvas.getBoundingClientRect().top - scrollY - 60, 320, 1600); }
const asPixel = c => { const g = el('canvas', {width: 1, height: 1}).getContext('2d'); g.fillStyle = c; g.fillRect(0, 0, 1, 1); return new Uint32Array(g.getImageData(0, 0, 1, 1).data.buffer)[0]; };
const dabs = new Map();                                       // stamp → its pixels, laid on the color of the page
function dab(stampCanvas, ground) {
  let d = dabs.get(stampCanvas);
  if (d?.ground === ground) return d;
  const {width, height} = stampCanvas, c = el('canvas', {width, height}), g = c.getContext('2d', {willReadFrequently: true});
  g.drawImage(stampCanvas, 0, 0);
  const a = g.getImageData(0, 0, width, height).data;
  g.globalCompositeOperation = 'destination-over';
  g.fillStyle = css('--bg');
  g.fillRect(0, 0, width, height);
  const px = new Uint32Array(g.getImageData(0, 0, width, height).data.buffer), at = [], color = [];
  for (let i = 0; i < px.length; i++) if (a[4*i + 3] > 24) { at.push(i % width - (width >> 1), Math.floor(i/width) - (height >> 1)); color.push(px[i]); }
  d = {ground, at: Int16Array.from(at), color: Uint32Array.from(color), half: Math.max(width, height)};
  if (dabs.size > 2000) dabs.clear();
  dabs.set(stampCanvas, d);
  return d;
}
function drawMap(pane) {                                      // thousands of points are written into its pixels, which is faster than drawing them
  const canvas = $(pane.id), m = pane.map;
  if (!canvas || !m) return;
  const [g, w, h, ratio] = fit(canvas, canvas.room ??= mapHeight(canvas)), W0 = canvas.width, H0 = canvas.height, {marks, box} = pane;
  if (pane.sheet?.width !== W0 || pane.sheet?.height !== H0) pane.sheet = g.createImageData(W0, H0);
  const out = new Uint32Array(pane.sheet.data.buffer), ground = marks.ground, {x, y} = m.unit;
  const s = scaleOf(pane, w, h)*ratio, x0 = (w/2 + pane.x)*ratio, y0 = (h/2 + pane.y)*ratio;
  out.fill(ground);
  for (const i of marks.order) {
    const d = marks[i], px = Math.round(x0 + x[i]*s), py = Math.round(y0 + y[i]*s), {at, color, half} = d;
    if (px < half || py < half || px >= W0 - half || py >= H0 - half) {
      if (px < -half || py < -half || px > W0 + half || py > H0 + half) continue;
      for (let j = 0; j < color.length; j++) { const u = px + at[2*j], v = py + at[2*j + 1]; if (u >= 0 && v >= 0 && u < W0 && v < H0) out[v*W0 + u] = color[j]; }
    } else { const o = py*W0 + px; for (let j = 0; j < color.length; j++) out[o + at[2*j + 1]*W0 + at[2*j]] = color[j]; }
  }
  g.putImageData(pane.sheet, 0, 0);
  for (const open of [S.n, S.w].map(id => id ? m.wells.indexOf(numberOf.get(id)) : -1)) if (open >= 0) { const [px, py] = toScreen(pane, open, w, h); g.strokeStyle = css('--fg'); g.lineWidth = 2.2; g.beginPath(); g.arc(px, py, mapRadius(pane) + 4, 0, 7); g.stroke(); }
  const aim = canvas.matches(':focus-visible') ? middle(pane) : null;      // what Enter would open
  if (aim != null) { const [px, py] = toScreen(pane, m.wells.indexOf(aim), w, h), r = mapRadius(pane) + 4; g.strokeStyle = css('--accent'); g.lineWidth = 2; g.strokeRect(px - r, py - r, 2*r, 2*r); }
  if (box) { g.strokeStyle = css('--accent'); g.lineWidth = 1.5; g.setLineDash([5, 3]); g.strokeRect(box.x, box.y, box.w, box.h); g.setLineDash([]); }
}
const mapRadius = pane => clamp(Math.round(60/Math.sqrt(pane.map.wells.length)*4)/2, 2.5, 7)*Math.min(1 + .12*Math.log2(Math.max(pane.k, 1)), 1.8);
function setMarks(pane) {
  const m = pane.map, ratio = ratioNow();
  if (!m) return;
  const r = Math.round(2*mapRadius(pane))/2, key = `${drawn}|${r}|${ratio}`, ground = asPixel(css('--bg'));
  if (pane.marks.key === key && pane.marks.map === m && pane.marks.ground === ground) return;
  const marks = pane.marks = m.wells.map(w => dab(stamp(paint.look(w), kind(w), r, !lit[w], ratio), ground));
  const layers = [[], [], []];                                // what is faded lies below what is gray, and that below colors
  m.wells.forEach((w, i) => { const look = paint.look(w); layers[!lit[w] ? 0 : look.empty || look.name === 'others' && look.color === GRAY ? 1 : 2].push(i); });
  marks.order = Int32Array.from(layers.flat());
  Object.assign(marks, {key, ground, map: m});
}
function later() { if (!frame) frame = requestAnimationFrame(() => { frame = 0; panes.forEach(drawMap); }); }
function zoom(pane, f, cx, cy) {
  const canvas = $(pane.id);
  if (!canvas) return;
  const w = canvas.clientWidth, h = canvas.clientHeight, k = clamp(pane.k*f, .5, 200), q = k/pane.k;
  cx ??= w/2; cy ??= h/2;
  pane.x = (cx - w/2)*(1 - q) + pane.x*q;
  pane.y = (cy - h/2)*(1 - q) + pane.y*q;
  pane.k = k;
  canvas.classList.toggle('zoomed', k > 1);
  setMarks(pane);
  later();
}
function nearest(pane, ev, reach = 12) {
  const canvas = $(pane.id), b = canvas.getBoundingClientRect(), m = pane.map, x = ev.clientX - b.left, y = ev.clientY - b.top;
  let best = null, d = reach*reach;
  for (let i = 0; i < m.wells.length; i++) {
    const [px, py] = toScreen(pane, i, canvas.clientWidth, canvas.clientHeight), dist = (px - x)**2 + (py - y)**2 + (lit[m.wells[i]] ? 0 : 40);
    if (dist < d) { d = dist; best = m.wells[i]; }
  }
  return best;
}
function middle(pane) {                                       // the well nearest to the middle, of those that are shown and in view
  const {clientWidth: w, clientHeight: h} = $(pane.id);
  let best = null, d = Infinity;
  pane.map.wells.forEach((well, i) => {
    const [x, y] = toScreen(pane, i, w, h), dist = (x - w/2)**2 + (y - h/2)**2;
    if (lit[well] && dist < d && x >= 0 && y >= 0 && x <= w && y <= h) { d = dist; best = well; }
  });
  return best;
}
function mapPointers(canvas, pane) {
  gestures(canvas, {
    at: (ev, reach) => nearest(pane, ev, reach), open: w => openWell(w), isMoved: () => pane.k !== 1 || pane.x !== 0 || pane.y !== 0,
    zoom: (f, x, y) => zoom(pane, f, x, y), reset: () => resetMap(pane), takesWheel: () => true,
    press: (ev, x, y, isMore) => { pane.box = (select || ev.shiftKey) && !isMore ? {x, y, w: 0, h: 0} : null; },
    pan: (dx, dy) => { if (pane.box) { pane.box.w += dx; pane.box.h += dy; } else { pane.x += dx; pane.y += dy; } later(); },
    release: isDrag => { const {box} = pane; pane.box = null; if (box && isDrag) selectBox(pane, box); later(); },
  });
  canvas.addEventListener('keydown', ev => {
    const move = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]}[ev.key];
    if (move) { pane.x += move[0]; pane.y += move[1]; later(); }
    else if (ev.key === '+' || ev.key === '=') zoom(pane, 1.3);
    else if (ev.key === '-') zoom(pane, 1/1.3);
    else if (ev.key === '0') resetMap(pane);
    else if (ev.key === 'Enter') { const w = middle(pane); if (w != null) openWell(w, true); }
    else return;
    const w = middle(pane);
    if (ev.key !== 'Enter' || w == null) say(w == null ? 'no well is near the middle of the map' : `in the middle: ${describe(w).join(', ')}`);
    ev.preventDefault();
  });
}
function resetMap(pane) { Object.assign(pane, {k: 1, x: 0, y: 0}); $(pane.id)?.classList.remove('zoomed'); setMarks(pane); later(); }
function selectBox(pane, box) {                               // the box in the numbers of its map, so that the address can keep it
  const canvas = $(pane.id), w = canvas.clientWidth, h = canvas.clientHeight, s = scaleOf(pane, w, h);
  const [x0, x1] = [box.x, box.x + box.w].sort((a, b) => a - b), [y0, y1] = [box.y, box.y + box.h].sort((a, b) => a - b);
  const at = [[x0, w, pane.x], [y0, h, pane.y], [x1, w, pane.x], [y1, h, pane.y]].map(([v, size, off]) => +((v - size/2 - off)/s).toFixed(4));
  const z = [pane.key, ...at].join();
  go({z: wellsIn(boxOf(z)).size ? z : ''});
}
function canvasRoom() { for (const {id} of panes) { const c = $(id); if (c) c.room = mapHeight(c); } }
function mapBar(sp, beside) {                                 // what stands above the maps
  const which = el('select', {id: 'which', onchange: ev => { panes.forEach(resetMap); go({k: Number(ev.target.value)}); }}, sp.maps.flatMap((m, i) => m.before == null ? [el('option', {value: i}, m.name)] : []));
  const others = D.spaces.flatMap((o, i) => o.maps.map((_, k) => `${i}.${k}`)).filter(key => key !== `${spaceNumber()}.${S.k}`);
  const second = el('select', {id: 'beside', onchange: ev => { resetMap(panes[1]); go({b: ev.target.value}); }}, el('option', {value: 'no'}, 'no other map'), others.map(key => el('option', {value: key}, mapTitle(key))));
  second.value = beside || 'no';
  const both = f => panes.forEach(p => { if (p.map) f ? zoom(p, f) : resetMap(p); });
  const box = el('input', {type: 'checkbox', id: 'select', onchange: ev => { select = ev.target.checked; for (const {id} of panes) $(id)?.classList.toggle('select', select); }});
  box.checked = select;
  return el('div', {class: 'row'}, el('label', {}, 'Map ', which), others.length ? el('label', {}, 'beside it ', second) : null, zoomButtons(both),
    el('label', {}, box, ' select by dragging (or Shift)'), el('span', {class: 'soft', id: 'map-said'}));
}
function mapFigure(pane, isAlone) {
  const name = mapTitle(pane.key), canvas = el('canvas', {id: pane.id, class: `${select ? 'select' : ''} ${pane.k > 1 ? 'zoomed' : ''}`, tabindex: 0, role: 'application', 'aria-roledescription': 'map', 'aria-label': `Map of embeddings (${name}): arrow keys move it, plus and minus zoom, 0 shows all, Enter opens the well nearest to the middle`, onfocus: later, onblur: () => { tip(null); later(); }});
  mapPointers(canvas, pane);
  return el('figure', {}, isAlone ? null : el('figcaption', {class: 'soft'}, name), canvas);
}
function showMap() {
  const root = $('map'), sp = space();
  if (!sp?.maps.length) { fill(root, el('p', {class: 'none'}, 'This page holds no embeddings.')); mapOf = ''; return; }
  if (!sp.maps[S.k] || sp.maps[S.k].before != null) S.k = 0;
  const keys = [`${spaceNumber()}.${S.k}`, besideKey()];
  panes.forEach((pane, i) => Object.assign(pane, {key: keys[i], map: keys[i] ? mapNamed(keys[i]) : null}));
  if (mapOf !== keys.join()) {
    mapOf = keys.join();
    const focus = root.contains(document.activeElement) ? document.activeElement.id : '';
    fill(root, mapBar(sp, keys[1]), el('div', {class: keys[1] ? 'maps two' : 'maps'}, panes.filter(p => p.map).map(p => mapFigure(p, !keys[1]))), el('p', {class: 'none', id: 'map-none', hidden: true}), sp.lacks.map(t => el('p', {class: 'soft about'}, t)));
    if (focus) $(focus)?.focus();
  }
  $('which').value = S.k;
  const m = panes[0].map;
  $('map-said').textContent = `${m.wells.length < N ? `${m.wells.length.toLocaleString('en')} of ${count(N, 'well')}: those that were embedded` : count(N, 'well')}. ${sp.name[0].toUpperCase() + sp.name.slice(1)} embeddings. ${m.about}`;
  canvasRoom();
  panes.forEach(p => { setMarks(p); drawMap(p); });
  $('map-none').hidden = m.wells.some(w => lit[w]);
  $('map-none').textContent = nLit ? `None of the ${count(nLit, 'well')} shown is on this map.` : elsewhere();
}

// ---- confusions
let sorted = {key: 'n', down: true};
function showConfusions() {
  const root = $('confusions'), p = P[S.p];
  if (!p) { fill(root, el('p', {class: 'none'}, 'This page holds no predictions.')); return; }
  const pairs = new Map(), of = new Map(), as = new Map(), pairWas = S.pair;
  p.wells.forEach((w, i) => {
    const t = truth(w), l = p.label[i];
    if (!counts(w) || !S.pair && !lit[w]) return;
    const o = of.get(t) ?? {label: label(t), n: 0, right: 0, away: new Map()};
    of.set(t, o);
    o.n++;
    as.set(l, (as.get(l) ?? 0) + 1);
    if (l === t) { o.right++; return; }
    o.away.set(l, (o.away.get(l) ?? 0) + 1);
    const k = `${label(t)}\t${label(l)}`, e = pairs.get(k) ?? {key: k, truth: label(t), taken: label(l), n: 0, of: o, experiments: new Set()};
    pairs.set(k, e);
    e.n++;
    e.experiments.add(W.experiment[w]);
  });
  if (!of.size) { fill(root, el('p', {class: 'none'}, isFiltered() ? 'No named well with a known label is shown: show all wells, or choose another filter.' : 'The labels of the named wells are not known.')); return; }
  const list = [...pairs.values()].sort((a, b) => b.n - a.n || b.n/b.of.n - a.n/a.of.n || order(a.truth, b.truth) || order(a.taken, b.taken));
  const rows = [...of.entries()].map(([t, o]) => ({...o, share: o.right/o.n, named: as.get(t) ?? 0, worst: [...o.away.entries()].sort((a, b) => b[1] - a[1])[0]}));
  rows.sort((a, b) => (sorted.down ? -1 : 1)*(sorted.key === 'label' ? order(a.label, b.label) : a[sorted.key] - b[sorted.key]) || order(a.label, b.label));
  const meter = v => { const i = el('i'); i.style.width = `${100*v}%`; return el('span', {class: 'meter', 'aria-hidden': true}, i); };
  const open = pair => () => go({pair: S.pair === pair ? '' : pair});
  const head = (key, title, n) => el('th', {class: n ? 'n' : '', 'aria-sort': sorted.key === key ? sorted.down ? 'descending' : 'ascending' : 'none'}, el('button', {type: 'button', onclick: () => { sorted = {key, down: sorted.key === key ? !sorted.down : key !== 'label'}; showConfusions(); }}, title + (sorted.key === key ? sorted.down ? ' ↓' : ' ↑' : '')));
  fill(root, el('p', {class: 'soft'}, `${p.protocol} (${p.about || 'protocol not known'}): ${count(list.reduce((s, o) => s + o.n, 0), 'wrong well')}, ${count(list.length, 'pair')}. Choose a pair or a ${D.target} to list its wells below, and to see them in the other views.`),
    el('div', {class: 'cols'},
      el('div', {}, el('h2', {}, 'Taken for another'), el('table', {}, el('thead', {}, el('tr', {}, el('th', {}, 'it is'), el('th', {}, 'named'), el('th', {class: 'n'}, 'wells'), el('th', {class: 'n'}, 'experiments'), el('th', {class: 'less'}, el('span', {class: 'unseen'}, 'bar')))),
        el('tbody', {}, list.slice(0, 200).map(o => el('tr', {}, el('td', {}, el('button', {type: 'button', class: 'link', 'aria-pressed': S.pair === o.key ? 'true' : 'false', onclick: open(o.key)}, nameOf(o.truth))), el('td', {}, nameOf(o.taken)), el('td', {class: 'n'}, `${o.n} of ${o.of.n}`), el('td', {class: 'n'}, String(o.experiments.size)), el('td', {class: 'less'}, meter(o.n/o.of.n)))))),
        list.length > 200 ? el('p', {class: 'soft'}, `and ${list.length - 200} more pairs`) : null),
      el('div', {}, el('h2', {}, `Each ${D.target}`), el('table', {}, el('thead', {}, el('tr', {}, head('label', D.target), head('n', 'wells', true), head('share', 'right', true), head('named', 'named so', true), el('th', {}, 'most often taken for'))),
        el('tbody', {}, rows.slice(0, 1200).map(o => el('tr', {}, el('td', {}, el('button', {type: 'button', class: 'link', 'aria-pressed': S.pair === o.label ? 'true' : 'false', onclick: open(o.label)}, nameOf(o.label))), el('td', {class: 'n'}, String(o.n)), el('td', {class: 'n'}, share(o.right, o.n)), el('td', {class: 'n'}, String(o.named)), el('td', {}, o.worst ? [nameOf(label(o.worst[0])), ` (${o.worst[1]})`] : '')))))) ));
}

// ---- the wells that a search, a filter or a box selects, as a table to copy or to store
const MOST_LISTED = 100;
function listColumns() {                                      // [heading, value of a well]
  const p = P[S.p], of = values => w => p.at[w] < 0 ? null : values?.[p.at[w]] ?? null;
  return [['well_id', w => W.id[w]], ['experiment', w => D.experiments[W.experiment[w]]], ['plate', w => D.plates[W.plate[w]]], ['well', w => W.well[w]], [D.target, w => label(truth(w))],
    ...p ? [['prediction', w => label(of(p.label)(w))], ['score', of(p.score)], ['protocol', w => p.at[w] < 0 ? null : p.protocol]] : [], ['kind', w => KINDS[kind(w)]]];
}
function listText(between) {                                  // all selected wells as text, a line for each
  const columns = listColumns(), rows = [columns.map(([name]) => name)], special = new RegExp(`["${between}\n\r]`);
  const cell = v => {                                         // as spreadsheets and pandas read it, and no formula
    const t = typeof v === 'string' && /^'*[=+\-@\t\r]/.test(v) ? `'${v}` : String(v);
    return special.test(t) ? `"${t.replaceAll('"', '""')}"` : t;
  };
  for (let w = 0; w < N; w++) if (lit[w]) rows.push(columns.map(([, of]) => of(w) ?? ''));
  return rows.map(row => row.map(cell).join(between) + '\n').join('');
}
async function copyList() {                                   // what is marked can be copied in the frame of a notebook too, where the clipboard itself is closed
  const area = el('textarea', {class: 'unseen'}), focus = document.activeElement;
  area.value = listText('\t');
  document.body.append(area);
  area.select();
  let isCopied = document.execCommand('copy');
  area.remove();
  focus.focus();
  if (!isCopied) try { await navigator.clipboard.writeText(area.value); isCopied = true; } catch { /* said below */ }
  return isCopied ? `${count(nLit, 'well')} copied` : 'The browser does not allow it here: download the table';
}
function storeList() {
  const a = el('a', {href: URL.createObjectURL(new Blob([listText(',')], {type: 'text/csv;charset=utf-8'})), download: `${document.title.replace(/[^\p{L}\p{N}-]+/gu, '_')}_wells.csv`});
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 60_000);
}
function showList() {
  const root = $('list'), columns = listColumns(), said = el('span', {class: 'soft', role: 'status'});
  if (!isFiltered() || !nLit) { fill(root, isFiltered() ? null : el('p', {class: 'soft'}, 'A search, a filter or a selected area of the map lists its wells here, to copy or to download.')); return; }
  const rows = [];
  for (let w = 0; w < N && rows.length < MOST_LISTED; w++) if (lit[w]) rows.push(el('tr', {}, columns.map(([name, of], i) => {
    const v = of(w), shown = typeof v === 'number' ? digits(v) : nameOf(v ?? '');
    return el('td', {class: typeof v === 'number' ? 'n' : ''}, i ? shown : el('button', {type: 'button', class: 'link', onclick: () => openWell(w, true)}, shown), name === 'prediction' && isJudged(w) ? result(w) === 'right' ? ' ✓' : ' ✗' : null);
  })));
  fill(root, el('div', {class: 'row'}, el('h2', {tabindex: -1}, count(nLit, 'selected well')), el('button', {type: 'button', onclick: async () => { said.textContent = await copyList(); }}, 'Copy'),
    el('button', {type: 'button', onclick: storeList}, 'Download CSV'), said),
    el('div', {class: 'scroll'}, el('table', {}, el('thead', {}, el('tr', {}, columns.map(([name]) => el('th', {class: name === 'score' ? 'n' : ''}, name)))), el('tbody', {}, rows))),
    nLit > rows.length ? el('p', {class: 'soft'}, `and ${count(nLit - rows.length, 'more well')}, which are copied and downloaded too`) : null);
}

// ---- accuracy: every column under its protocol
function showAccuracy() {
  const root = $('accuracy'), A = D.accuracy;
  if (!A.length) { fill(root, el('p', {class: 'none'}, 'The labels of the named wells are not known, so there is no accuracy.')); return; }
  const shown = Array.from({length: N}, (_, w) => w).filter(w => lit[w]), [right, n] = P.length ? tally(shown) : [0, 0];
  const filtered = isFiltered() ? el('p', {id: 'filtered'}, `These figures are of all named wells: a filter does not change them. Of the ${count(nLit, 'well')} shown now, ${n ? `${right} of ${n} are right (${share(right, n)}, ${P[S.p].protocol})` : 'none was named and has a known label'}.`) : null;
  fill(root, filtered, el('p', {class: 'soft'}, D.accuracy_note), el('div', {class: 'blocks'}, A.map(a => el('div', {}, el('h2', {}, a.name, ' ', el('span', {class: 'tag soft'}, a.protocol)), el('p', {class: 'soft about'}, P.find(p => p.name === a.name)?.about ?? ''), el('p', {class: 'soft about'}, P.find(p => p.name === a.name)?.how ?? ''), el('div', {class: 'wide'}, el('table', {},
    el('thead', {}, el('tr', {}, el('th', {}, 'wells of'), el('th', {class: 'n'}, 'wells'), el('th', {class: 'n'}, 'right'), el('th', {class: 'n'}, '95% interval'), el('th', {class: 'bars'}, '0 … 1, chance in orange'))),
    el('tbody', {}, a.rows.map(r => {
      const bar = el('div', {class: 'interval', 'aria-hidden': true}), put = (tag, from, to) => { const o = el(tag); o.style.left = `${100*from}%`; if (to != null) o.style.width = `${100*(to - from)}%`; bar.append(o); };
      if (r.low != null) put('i', r.low, r.high);
      put('s', a.chance);
      put('b', r.value);
      const name = r.group === 'experiment' && byName.has(r.name) ? el('button', {type: 'button', class: 'link', onclick: () => go({v: 'plates', e: r.name, p: P.findIndex(p => p.name === a.name)})}, nameOf(r.name)) : nameOf(r.name);
      return el('tr', {}, el('td', {}, name), el('td', {class: 'n'}, String(r.n)), el('td', {class: 'n'}, digits(r.value)), el('td', {class: 'n'}, r.low == null ? '–' : `${digits(r.low)} – ${digits(r.high)}`), el('td', {}, bar));
    }))))))));
}

// ---- legend, filters, tabs
function swatch(look, shape = 0) {
  const c = el('canvas', {'aria-hidden': true}), ratio = ratioNow(), s = stamp(look, shape, 7, false, ratio);
  c.width = s.width; c.height = s.height;
  c.style.width = c.style.height = `${s.width/ratio}px`;
  c.getContext('2d').drawImage(s, 0, 0);
  return c;
}
const ofView = () => S.v === 'map' ? space()?.maps[0]?.wells ?? [] : (byName.get(S.e)?.plates ?? []).flatMap(p => p.wells);
function sizes(wells, of) {                                   // group → [wells, controls beside them], of those that the other filters show
  const n = new Map(), isApart = w => kind(w) && (S.c !== 'result' || P[S.p].controls_apart);
  for (const w of wells) if (asks[w]) {
    const g = of(w);
    if (!n.has(g)) n.set(g, [0, 0]);
    n.get(g)[isApart(w) ? 1 : 0]++;
  }
  return g => { const [a, b] = n.get(g) ?? [0, 0], c = b ? count(b, 'control') : ''; return `(${!b ? a.toLocaleString('en') : a ? `${a.toLocaleString('en')} + ${c}` : c})`; };
}
function showLegend() {
  const root = $('legend'), isShown = S.v === 'plates' || S.v === 'map';
  root.hidden = !isShown;
  if (!isShown) return;
  const wells = ofView(), gray = {color: css('--empty'), mark: '', empty: true}, parts = [];
  const head = el('b', {}, `${colorTitle(S.c)}, wells of ${S.v === 'map' ? 'this map' : S.e}`, isFiltered() ? ' that are shown' : '');
  const group = paint.groups ? w => { const c = paint.code(w); return paint.groups.has(c) ? c : paint.look(w).empty ? 'none' : 'more'; } : w => paint.value(w) == null ? 'none' : 'some';
  const size = sizes(wells, group), entry = (look, shape, name, n) => el('span', {}, swatch(look, shape), `${name} ${n}`);
  if (paint.groups) {
    for (const [code, look] of paint.groups) parts.push(el('button', {type: 'button', 'aria-pressed': pick === code ? 'true' : 'false', onclick: () => go({g: pick === code ? '' : look.name})}, swatch(look), nameOf(look.name), ` ${size(code)}`));
    if (paint.more) parts.push(entry({color: GRAY, mark: ''}, 0, `${paint.more} more, too many for colors: search for one`, size('more')));
  } else {
    const bar = el('span', {class: 'ramp', role: 'img', 'aria-label': 'from dark blue (low) to yellow (high)'});
    bar.style.background = `linear-gradient(90deg,${RAMP.map(c => `rgb(${c})`).join(',')})`;
    parts.push(short(paint.lo), bar, `${short(paint.hi)}${paint.isLog ? ' (log scale)' : ''} ${size('some')}`);
  }
  const kinds = [...new Set(W.kind)].sort(), n = kinds.map(k => wells.filter(w => asks[w] && kind(w) === k).length);
  const shapes = [el('span', {class: 'kinds'}, entry(gray, 0, paint.rest, size('none')), kinds.length > 1 ? kinds.map((k, i) => entry({color: GRAY, mark: ''}, k, KINDS[k], `(${n[i].toLocaleString('en')})`)) : null, S.v === 'plates' ? el('span', {}, '· no well') : null)];
  const focus = [...root.querySelectorAll('button')].indexOf(document.activeElement);
  fill(root, head, el('div', {class: 'groups'}, parts), shapes);
  if (focus >= 0) root.querySelectorAll('button')[focus]?.focus();
}
function options(select, entries, value) {
  const now = entries.map(([k, v]) => `${k}\t${v}`).join('\n');
  if (select.dataset.now !== now) { fill(select, entries.map(([k, v]) => el('option', {value: k}, v))); select.dataset.now = now; }
  select.value = value;
}
function showBar() {
  options($('prediction'), P.map((p, i) => [i, p.name === p.protocol ? p.name : `${p.name} (${p.protocol})`]), S.p);
  $('prediction').parentElement.hidden = !P.length;
  $('prediction').title = P.length ? `${P[S.p].protocol}: ${P[S.p].about}` : '';
  $('result').parentElement.hidden = !P.length;
  options($('color'), colorNames().map(c => [c, colorTitle(c)]), S.c);
  $('result').value = S.r;
  const texts = W.columns.filter(c => c.kind === 'text');
  options($('column'), [['', 'any well'], ...texts.map(c => [c.name, c.name])], S.f);
  $('value').parentElement.hidden = !S.f;
  if (S.f) options($('value'), [['', 'anything'], ...columns[S.f].names.slice().sort(order).map(n => [n, n])], S.x);
  if (document.activeElement !== $('search')) $('search').value = S.q;
  $('count').textContent = !isFiltered() ? count(N, 'well') : !nLit && S.q.trim() ? nothingSaid() : `${nLit.toLocaleString('en')} of ${count(N, 'well')}${controlsShown()}${foundSaid()}`;
  $('clear').hidden = !isFiltered();
  $('to-list').hidden = !isFiltered() || !nLit;
  const chip = (t, f) => el('button', {type: 'button', class: 'chip', onclick: f}, t, ' ✕');
  const [is, as] = S.pair.split('\t');
  fill($('chips'), S.pair ? chip(as ? [nameOf(is), ' named ', nameOf(as)] : nameOf(is), () => go({pair: ''})) : null, brush ? chip(`${count(brush.size, 'selected well')}`, () => go({z: ''})) : null, S.n ? chip(['pinned: ', nameOf(S.n)], () => go({n: ''}, false)) : null);
  for (const [k] of Object.entries(VIEWS)) { const t = $('tab-' + k), is = k === S.v; t.setAttribute('aria-selected', String(is)); t.tabIndex = is ? 0 : -1; $(k).hidden = !is; }
}
let drawn = 0, drawnKey = '', turns = 0;                       // drawn: number of the look that wells have now
function update() {                                           // how wells look and which are shown, where that has changed
  const key = [S.p, S.c, S.q, S.r, S.f, S.x, S.pair, S.g, S.z, turns].join('\t');
  if (key !== drawnKey) {
    setPaint();
    pick = S.g ? [...paint.groups ?? []].find(([, look]) => look.name === S.g)?.[0] ?? null : null;
    brush = S.z ? wellsIn(boxOf(S.z)) : null;
    setFilter();
    drawnKey = key;
    drawn++;
  }
}
function show(again = false) {
  tip(null);                                                  // what it said may no longer be so
  setTune();
  if (again) { turns++; stamps.clear(); }
  update();
  showBar();
  const view = `${S.v}|${S.v === 'map' ? '' : S.e}|${drawn}`;
  if (view !== showLegend.done) { showLegend(); showLegend.done = view; }
  showWell();
  ({plates: showPlates, map: showMap, confusions: showConfusions, accuracy: showAccuracy})[S.v]();
  if (drawn !== showList.done) { showList(); showList.done = drawn; }
}
function start() {
  fill($('tabs'), Object.entries(VIEWS).map(([k, title]) => el('button', {type: 'button', role: 'tab', id: 'tab-' + k, 'aria-controls': k, onclick: () => go({v: k})}, title)));
  $('tabs').addEventListener('keydown', ev => {
    const keys = Object.keys(VIEWS), d = {ArrowRight: 1, ArrowLeft: -1}[ev.key];
    if (d) { go({v: keys[(keys.indexOf(S.v) + d + keys.length) % keys.length]}); $('tab-' + S.v).focus(); }
  });
  $('prediction').addEventListener('change', ev => go({p: Number(ev.target.value), g: ''}));
  $('color').addEventListener('change', ev => go({c: ev.target.value, g: ''}));
  $('result').addEventListener('change', ev => go({r: ev.target.value}));
  $('column').addEventListener('change', ev => go({f: ev.target.value, x: ''}));
  $('value').addEventListener('change', ev => go({x: ev.target.value}));
  $('search').addEventListener('input', ev => { go({q: ev.target.value}, false); });
  $('search').addEventListener('keydown', ev => {
    if (ev.key === 'Enter') { const w = lit.indexOf(1); if (w >= 0) openWell(w, true); else say(nothingSaid()); }
    if (ev.key === 'Escape' && S.q) { ev.target.value = ''; go({q: ''}, false); ev.stopPropagation(); }
  });
  $('clear').addEventListener('click', () => { $('search').value = ''; go({q: '', r: '', f: '', x: '', pair: '', g: '', z: ''}); });
  $('to-list').addEventListener('click', () => { $('list').scrollIntoView(); $('list').querySelector('h2').focus(); });
  $('skip').addEventListener('click', ev => { ev.preventDefault(); ($('views').querySelector('canvas,button'))?.focus(); });
  document.addEventListener('keydown', ev => { if (ev.key === 'Escape') { tip(null); if (S.w) closeWell(); } });
  addEventListener('resize', () => { clearTimeout(start.t); start.t = setTimeout(() => show(), 60); });
  matchMedia('(prefers-color-scheme:dark)').addEventListener('change', () => show(true));
  const paper = on => { if (on === isPaper) return; isPaper = on; document.documentElement.toggleAttribute('data-paper', on); show(true); };
  addEventListener('beforeprint', () => paper(true));
  addEventListener('afterprint', () => paper(false));
  matchMedia('print').addEventListener('change', ev => paper(ev.matches));
  new ResizeObserver(() => { clearTimeout(start.t); start.t = setTimeout(() => show(), 60); }).observe($('views'));
  fill($('foot'), D.notes.map(n => el('p', {}, n)));
  read();
  show();
  document.documentElement.dataset.ready = 'yes';
  if (!FILES.length) (window.requestIdleCallback ?? setTimeout)(readLines);
}
function toMatch() {                                          // the first experiment with wells that are shown, when this one has none
  update();
  if (!isFiltered() || !nLit) return;
  const has = e => e.plates.some(p => p.wells.some(w => lit[w]));
  if (!has(byName.get(S.e) ?? {plates: []})) S.e = experiments.find(has)?.name ?? S.e;
}
start();
})();
