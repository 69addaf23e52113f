// Search that works from the file system, and puts exact matches first.
//
// A browser refuses fetch() on a page opened from the file system, and smalldocs fetches its index (its only fetch).
// The index comes from a script instead, hosted or not.
window.fetch = url => new Promise((done, fail) => {
  const script = document.createElement('script');
  script.src = String(url).replace('search.json', 'search.js');
  script.onload = () => done({json: async () => window.searchIndex});
  script.onerror = fail;
  document.head.append(script);
});

// smalldocs asks Fuse, which matches loosely: "umap" would find right_wrong_map. This stands in its place and asks Fuse
// only when nothing matches, for words that are long enough to be misspelt.
const Loose = window.Fuse;

// The places of a word in a text, best first: a word of its own, a part of a name (`plot` in `plot_channels`, `Site` in
// `TensorSite`), the beginning of a word, anywhere.
const wordMatches = word => {
  const safe = word.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
  const title = safe.charAt(0).toUpperCase() + safe.slice(1);
  return [new RegExp(`(?<!\\w)${safe}(?!\\w)`, 'i'), new RegExp(`(?<![A-Za-z0-9])${safe}(?![A-Za-z0-9])`, 'i'),
          new RegExp(`(?<=[a-z0-9])${title}(?![a-z])`), new RegExp(`(?<![A-Za-z0-9])${safe}`, 'i'),
          new RegExp(safe, 'i')].map((form, n) => [form, [0, 2, 2, 4, 8][n]]);
};

// Lower is better. A heading counts before a title, a title before the text; undefined: no match.
const rank = (entry, forms, query) => {
  const heading = entry.section || entry.title;
  if (heading.toLowerCase() === query) return {rank: -1, at: 0};
  let best;
  const look = (text, extra) => forms.forEach(([form, cost]) => {
    const at = text.search(form);
    if (at >= 0 && (!best || cost + extra < best.rank)) best = {rank: cost + extra, at: extra === 3 ? at : 0};
  });
  look(heading, 0);
  look(entry.title, 1);
  look(entry.text, 3);
  return best;
};

window.Fuse = class {
  constructor(index, options) { this.index = index; this.options = options; }

  search(query, {limit = 20} = {}) {
    const phrase = query.toLowerCase().trim(), words = phrase.split(/\s+/);
    const forms = words.map(wordMatches), whole = wordMatches(phrase);
    const found = [];
    this.index.forEach((entry, order) => {
      const together = rank(entry, whole, phrase);
      const ranks = together ? [together] : forms.map(form => rank(entry, form, phrase));
      if (ranks.some(r => !r)) return;
      const start = Math.max(0, Math.min(...ranks.map(r => r.at)) - 40);
      const text = start ? entry.text.slice(entry.text.indexOf(' ', start) + 1) : entry.text;   // shown from the match
      const apart = together ? 0 : 20;
      found.push({item: {...entry, text}, order, rank: apart + ranks.reduce((sum, r) => sum + r.rank, 0)});
    });
    const isLong = phrase.length > 4;
    if (!found.length) return Loose && isLong ? new Loose(this.index, this.options).search(query, {limit}) : [];
    return found.sort((a, b) => a.rank - b.rank || a.order - b.order).slice(0, limit);
  }
};
