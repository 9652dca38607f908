"use strict";
// Sections 3 to 5. The data are texts that a model or a stranger wrote: they become text nodes and
// attribute values, never markup. The content-security policy forbids everything that would parse
// them.
(() => {
  const ROW = 58; // pixels of an entry in a list, as in page.css
  const byId = (id) => document.getElementById(id);

  // An element; strings among the children become text.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  }

  const number = (value, digits = 2) => (value === null || value === undefined ? "–"
    : value.toFixed(digits).replace("-", "−"));
  const percent = (value) => `${Math.round(100 * value)} %`;
  // The largest of the values that are known, null where none is.
  const largest = (values) => {
    const known = values.filter((value) => value !== null && value !== undefined);
    return known.length ? Math.max(...known) : null;
  };

  // ---- words that differ

  // Two texts, each as a list of [piece, differs]: a piece is a word, or the space between two
  // words. Words of the longest common subsequence do not differ. Texts that are too long for it
  // (over four million pairs of words) are compared as sets of words.
  function compare(a, b) {
    const texts = [a, b].map((text) => text.split(/(\s+)/)); // words at even places
    const words = texts.map((pieces) => pieces.filter((_, i) => i % 2 === 0));
    const same = words.map((list) => new Uint8Array(list.length)); // of each text, by word: 0 or 1
    // 1. equal words at both ends
    let start = 0;
    let ends = words.map((list) => list.length);
    while (start < Math.min(...ends) && words[0][start] === words[1][start]) {
      same[0][start] = same[1][start] = 1;
      start += 1;
    }
    while (Math.min(...ends) > start && words[0][ends[0] - 1] === words[1][ends[1] - 1]) {
      ends = ends.map((end) => end - 1);
      same[0][ends[0]] = same[1][ends[1]] = 1;
    }
    // 2. the n and m words between them
    const [n, m] = ends.map((end) => end - start);
    if (n * m <= 4e6) markSubsequence(words, same, start, n, m);
    else markSharedWords(words, same, start, ends);
    return texts.map((pieces, side) => pieces.map((piece, i) => {
      const isWord = i % 2 === 0 && piece !== "";
      return [piece, isWord && !same[side][i / 2]];
    }));
  }

  // Mark a longest common subsequence of n words of one text and m of the other, from `start` on.
  function markSubsequence(words, same, start, n, m) {
    const equal = (i, j) => words[0][start + i] === words[1][start + j];
    const width = m + 1;
    const length = new Uint16Array((n + 1) * width); // of the subsequence from words i and j on
    for (let i = n - 1; i >= 0; i -= 1) {
      for (let j = m - 1; j >= 0; j -= 1) {
        const withoutI = length[(i + 1) * width + j];
        const withoutJ = length[i * width + j + 1];
        const withoutBoth = length[(i + 1) * width + j + 1];
        length[i * width + j] = equal(i, j) ? withoutBoth + 1 : Math.max(withoutI, withoutJ);
      }
    }
    let [i, j] = [0, 0];
    while (i < n && j < m) {
      const withoutI = length[(i + 1) * width + j];
      const withoutJ = length[i * width + j + 1];
      if (equal(i, j)) {
        same[0][start + i] = same[1][start + j] = 1;
        i += 1;
        j += 1;
      } else if (withoutI >= withoutJ) i += 1;
      else j += 1;
    }
  }

  // Mark the words from `start` on that occur anywhere in that part of the other text.
  function markSharedWords(words, same, start, ends) {
    const middles = words.map((list, side) => new Set(list.slice(start, ends[side])));
    words.forEach((list, side) => {
      const other = middles[1 - side];
      for (let i = start; i < ends[side]; i += 1) same[side][i] = other.has(list[i]);
    });
  }

  // A text with its differing words marked; neighbours, with the space between them, as one mark.
  function marked(pieces, label) {
    const text = make("div", { class: "text", dir: "auto" });
    let run = "";
    const flush = () => {
      if (run) text.append(make("mark", { title: label }, run));
      run = "";
    };
    pieces.forEach(([piece, differs], i) => {
      const isSpace = i % 2 === 1;
      const nextDiffers = pieces[i + 1]?.[1];
      const isBetween = run && isSpace && nextDiffers;
      if (differs || isBetween) run += piece;
      else {
        flush();
        text.append(piece);
      }
    });
    flush();
    text.normalize();
    return text;
  }

  // The same entry in the other runs of the page, as [run, entry].
  function elsewhere(list, id) {
    const others = report.runs.filter((run) => run !== current);
    const entries = others.map((run) => [run, run[list].find((one) => one.id === id)]);
    return entries.filter(([, one]) => one);
  }

  const plain = (text) => make("div", { class: "text", dir: "auto" }, text);
  const badge = (text, kind) => make("span", { class: `badge ${kind}` }, text);

  function column(title, notes, text, kind) {
    return make("section", { class: `column ${kind ?? ""}` },
      make("h4", {}, title), make("p", { class: "notes" }, notes), text);
  }

  function conversation(messages) {
    const last = messages.at(-1);
    const earlier = messages.slice(0, -1);
    const shown = (message) => [make("h5", {}, message.role), plain(message.content)];
    const parts = [];
    if (earlier.length) {
      const summary = make("summary", {}, `${earlier.length} earlier messages`);
      parts.push(make("details", {}, summary, earlier.map(shown)));
    }
    if (last) parts.push(plain(last.content));
    return make("div", { class: "instruction" }, parts);
  }

  // ---- a list, of which the document holds the visible part only, beside the chosen entry

  class Browser {
    constructor(root, view) {
      this.root = root;
      this.view = view; // key, name, text(), option(), detail(), filters(), sorts
      this.form = root.querySelector("form");
      this.list = root.querySelector(".list");
      this.detail = root.querySelector(".detail");
      this.output = root.querySelector("output");
      this.space = make("div", { class: "space", role: "presentation" });
      this.list.append(this.space);
      const { search, filter, sort } = this.form.elements;
      Object.assign(this, { search, filter, sort });
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.search.addEventListener("input", () => this.refresh());
      this.filter.addEventListener("change", () => this.refresh());
      this.sort.addEventListener("change", () => {
        this.chosen = null; // the first entry of the new order is shown
        this.refresh();
      });
      this.list.addEventListener("scroll", () => this.draw(), { passive: true });
      this.list.addEventListener("click", (event) => {
        const option = event.target.closest("[role=option]");
        if (option) this.choose(this.shown[Number(option.dataset.at)]);
      });
      root.addEventListener("keydown", (event) => this.key(event));
      new ResizeObserver(() => this.draw()).observe(this.list);
    }

    load(items) {
      this.items = items;
      this.filters = this.view.filters(items);
      const options = Object.entries(this.filters).map(([value, [label, test]]) =>
        make("option", { value }, `${label} (${items.filter(test).length.toLocaleString("en")})`));
      this.filter.replaceChildren(...options);
      const sort = this.sort.value;
      this.sort.replaceChildren(...Object.entries(this.view.sorts).map(([value, [label]]) =>
        make("option", { value, selected: value === sort ? "" : null }, label)));
      this.chosen = null;
      this.refresh();
      this.index(0);
    }

    // Make the lower-cased texts for the search, 200 at a time, so that the page stays responsive.
    index(start) {
      const items = this.items;
      const end = Math.min(start + 200, items.length);
      for (let i = start; i < end; i += 1) this.haystack(items[i]);
      if (end < items.length) setTimeout(() => items === this.items && this.index(end));
    }

    haystack(item) {
      item.haystack ??= this.view.text(item).join("\n").toLowerCase();
      return item.haystack;
    }

    refresh() {
      const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const [, test] = this.filters[this.filter.value];
      const [, key] = this.view.sorts[this.sort.value];
      this.shown = this.items.filter((item) => test(item)
        && words.every((word) => this.haystack(item).includes(word)));
      if (key) { // largest first, the unknown last
        const keys = new Map(this.shown.map((item) => [item, key(item) ?? -Infinity]));
        this.shown.sort((a, b) => keys.get(b) - keys.get(a) || 0);
      }
      const [n, all] = [this.shown.length, this.items.length].map((x) => x.toLocaleString("en"));
      this.output.textContent = n === all ? `${all} ${this.view.name}`
        : `${n} of ${all} ${this.view.name}`;
      this.space.style.height = `${this.shown.length * ROW}px`;
      this.list.scrollTop = 0;
      if (this.shown.length && !this.shown.includes(this.chosen)) this.open(this.shown[0]);
      else if (this.shown.length) this.reveal();
      else this.empty();
      this.draw();
    }

    empty() {
      this.chosen = null;
      const text = this.items.length ? "Nothing fits the search." : this.view.nothing;
      this.detail.replaceChildren(make("p", { class: "note" }, text));
    }

    draw() {
      const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
      const last = Math.min(this.shown.length, first + Math.ceil(this.list.clientHeight / ROW) + 9);
      const options = [];
      for (let at = first; at < last; at += 1) {
        const item = this.shown[at];
        const option = make("div", {
          role: "option", class: "option", id: `${this.view.key}-${at}`, "data-at": at,
          "aria-selected": item === this.chosen, "aria-setsize": this.shown.length,
          "aria-posinset": at + 1,
        }, this.view.option(item));
        option.style.top = `${at * ROW}px`;
        options.push(option);
      }
      this.space.replaceChildren(...options);
      const at = this.shown.indexOf(this.chosen);
      if (at >= first && at < last) {
        this.list.setAttribute("aria-activedescendant", `${this.view.key}-${at}`);
      } else this.list.removeAttribute("aria-activedescendant");
    }

    reveal() {
      const top = this.shown.indexOf(this.chosen) * ROW;
      const room = this.list.clientHeight - ROW;
      if (top < this.list.scrollTop) this.list.scrollTop = top;
      else if (top > this.list.scrollTop + room) this.list.scrollTop = top - room;
    }

    // Show an entry; `choose` also puts it into the address, so that it can be passed on.
    open(item) {
      this.chosen = item;
      const step = (by, label, sign) => make("button", {
        type: "button", "aria-label": label, title: label, "data-step": by,
        click: () => this.step(by),
      }, sign);
      const active = document.activeElement; // restored below, because its element is replaced
      const focused = active !== this.detail && this.detail.contains(active);
      const head = make("div", { class: "head" },
        make("h3", { dir: "auto" }, this.view.title(item)), this.view.badges(item),
        make("span", { class: "walk" },
          make("a", { href: address(this.view.key, item.id), title: "Link to this entry" }, "link"),
          step(-1, "Previous", "←"), step(1, "Next", "→")));
      this.detail.replaceChildren(head, ...this.view.detail(item));
      this.detail.setAttribute("aria-label", this.view.title(item));
      this.detail.scrollTop = 0;
      if (focused) {
        const again = this.detail.querySelector(`[data-step="${active.dataset.step}"]`);
        (again ?? this.detail).focus({ preventScroll: true });
      }
      this.view.opened?.(item);
      this.reveal();
      this.draw();
    }

    choose(item) {
      this.open(item);
      history.replaceState(null, "", address(this.view.key, item.id));
    }

    step(by) {
      if (!this.shown.length) return;
      const at = this.shown.indexOf(this.chosen) + by;
      this.choose(this.shown[Math.min(this.shown.length - 1, Math.max(0, at))]);
    }

    // Open the entry of that id, even where the search hides it; false where there is none.
    find(id) {
      const item = this.items.find((one) => one.id === id);
      if (!item) return false;
      if (!this.shown.includes(item)) {
        this.search.value = "";
        this.filter.selectedIndex = 0;
        this.refresh();
      }
      this.open(item);
      return true;
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.matches("input, select")) {
        if (event.key === "Escape") this.list.focus();
        return;
      }
      const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
      const steps = { j: 1, k: -1 };
      if (event.target === this.list) {
        Object.assign(steps, { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page,
          Home: -this.shown.length, End: this.shown.length });
      }
      if (event.key === "/") this.search.focus();
      else if (event.key in steps) this.step(steps[event.key]);
      else return;
      event.preventDefault();
    }
  }

  // ---- section 3

  const gap = (row) => (row.reference_nll === null || row.response_nll === null ? null
    : row.reference_nll - row.response_nll);
  const kind = (row) => (row.kept ? "kept" : "rejected");
  // The tries of a cascade, as in "unguided mismatch, empty → guided accepted"; "" for a single
  // try, which the other badges show.
  function tried(row) {
    const n = Object.values(row.tries).flat().length;
    if (n < 2) return "";
    const stages = Object.entries(row.tries);
    return stages.map(([stage, statuses]) => `${stage} ${statuses.join(", ")}`).join(" → ");
  }

  const rowsView = {
    key: "row",
    name: "rows",
    nothing: "No rows.",
    text: (row) => [row.id, row.status, row.reference, row.response,
      ...row.messages.map((message) => message.content)],
    sorts: {
      file: ["order of the file", null],
      gap: ["NLL gap, reference − rewrite", gap],
      back: ["NLL gap, smallest first", (row) => (gap(row) === null ? null : -gap(row))],
      reference: ["NLL of the reference", (row) => row.reference_nll],
      response: ["NLL of the rewrite", (row) => row.response_nll],
      long: ["length of the rewrite", (row) => row.response.length],
      ratio: ["length of rewrite / reference",
        (row) => row.response.length / row.reference.length],
    },
    filters: (rows) => {
      const found = {
        all: ["all", () => true],
        kept: ["rewrite kept", (row) => row.kept],
        rejected: ["rewrite rejected", (row) => !row.kept],
        tokens: ["with token likelihoods", (row) => tokensOf(row) !== undefined],
      };
      for (const name of [...new Set(rows.map((row) => row.status))].sort()) {
        found[`status ${name}`] = [`status: ${name}`, (row) => row.status === name];
      }
      const stages = [...new Set(rows.map((row) => row.stage))];
      for (const name of stages.length > 1 ? stages : []) {
        found[`stage ${name}`] = [`stage: ${name}`, (row) => row.stage === name];
      }
      return found;
    },
    title: (row) => row.id,
    badges: (row) => [badge(row.status, kind(row)), badge(row.stage, "quiet"),
      tried(row) ? badge(tried(row), "quiet") : null,
      row.finish === "stop" ? null : badge(`ended by ${row.finish}`, "quiet")],
    option: (row) => [
      make("span", { class: "line" }, make("b", {}, row.messages.at(-1)?.content.slice(0, 160))),
      make("span", { class: "line" }, badge(row.status, kind(row)),
        make("span", { class: "figures" },
          `NLL ${number(row.reference_nll)} → ${number(row.response_nll)}`),
        make("span", { class: "id" }, row.id)),
    ],
    detail: (row) => {
      const cost = (one, text) => [`${one[`${text}_tokens`] ?? "–"} tokens, `,
        make("b", {}, number(one[`${text}_nll`])), " nats per token under the seed"];
      const trains = { sft: badge("SFT trains on it", "sft"), sdft: badge("SDFT trains on it", "sdft") };
      const rewrite = (one, title) => column(
        [title, one.kept ? trains.sdft.cloneNode(true) : badge(one.status, "rejected")],
        cost(one, "response"),
        marked(compare(one.reference, one.response)[1], "only in the rewrite"));
      return [
        conversation(row.messages),
        make("div", { class: "columns" },
          column(["Reference", trains.sft, row.kept ? null : trains.sdft], cost(row, "reference"),
            marked(compare(row.reference, row.response)[0], "only in the reference")),
          rewrite(row, "Rewrite"),
          elsewhere("rows", row.id).map(([run, one]) => rewrite(one, `Rewrite · ${run.name}`))),
        make("p", { class: "notes" },
          `NLL gap ${number(gap(row))} nats per token, length ratio `
          + `${number(row.response.length / row.reference.length)}. `,
          make("a", { href: address("tokens", row.id) }, "The training text of this row")),
      ];
    },
    opened: (row) => showTokens(row),
  };

  // ---- section 4

  const verdicts = (item) => current.arms.map(([arm]) => item.answers[arm]?.ok);
  const held = (item) => item.source === "held-out";
  const mark = (answer) => (answer?.ok === undefined ? null
    : badge(answer.ok ? "right" : `wrong: ${answer.reason}`, answer.ok ? "kept" : "rejected"));

  const answersView = {
    key: "answer",
    name: "prompts",
    nothing: "No answers.",
    text: (item) => [item.id, item.category, item.reference ?? "",
      ...item.messages.map((message) => message.content),
      ...Object.values(item.answers).map((answer) => answer.text)],
    get sorts() {
      const sorts = {
        kl: [`KL to seed, ${tuned().length === 2 ? "larger of the two" : "largest"}`,
          (item) => largest(Object.values(item.kl))],
      };
      for (const [arm, name] of tuned()) {
        sorts[`kl ${arm}`] = [`KL to seed of ${name}`, (item) => item.kl[arm]];
      }
      sorts.file = ["order of the file", null];
      return sorts;
    },
    filters: (items) => {
      const found = {
        all: ["all", () => true],
        every: [`answered by all ${current.arms.length === 3 ? "three" : current.arms.length}`,
          (item) => current.arms.every(([arm]) => item.answers[arm])],
        held: ["held-out questions", held],
        flips: ["verdicts differ", (item) => held(item) && new Set(verdicts(item)).size > 1],
        general: ["general prompts", (item) => !held(item)],
      };
      const general = items.filter((item) => !held(item));
      for (const name of new Set(general.map((item) => item.category))) {
        found[`category ${name}`] = [`general: ${name}`, (item) => item.category === name];
      }
      return found;
    },
    title: (item) => (held(item) ? `held-out ${item.id}` : "general prompt"),
    badges: (item) => [held(item) ? null : badge(item.category, "quiet")],
    option: (item) => [
      make("span", { class: "line" },
        make("b", {}, (item.messages.at(-1)?.content ?? item.id).slice(0, 160))),
      make("span", { class: "line" },
        held(item) ? make("span", { class: "verdicts" }, current.arms.map(([arm, name]) =>
          badge(`${name} ${item.answers[arm]?.ok ? "✓" : "✗"}`,
            item.answers[arm]?.ok ? "kept" : "rejected"))) : badge(item.category, "quiet"),
        make("span", { class: "figures" },
          `KL ${tuned().map(([arm]) => number(item.kl[arm], 3)).join(" / ")}`)),
    ],
    detail: (item) => {
      const ofRun = current.arms.map((arm) => answerColumn(item, arm, arm[1]));
      const ofOthers = elsewhere("answers", item.id).map(([run, one]) =>
        run.arms.slice(1).map((arm) => answerColumn(one, arm, `${arm[1]} · ${run.name}`)));
      const parts = [
        conversation(item.messages),
        make("div", { class: "columns" }, ofRun, ofOthers),
      ];
      if (item.reference !== undefined) {
        parts.push(make("details", {}, make("summary", {}, "Reference"), plain(item.reference)));
      }
      return parts;
    },
  };

  // The answer of an arm with its verdict and drift; words that the seed's answer lacks are marked.
  function answerColumn(item, [arm, , ink], title) {
    const answer = item.answers[arm];
    const seed = item.answers.seed?.text ?? "";
    const notes = [mark(answer)];
    if (answer?.finish === "length") notes.push(badge("cut short", "quiet"));
    if (arm !== "seed") {
      const agree = item.agree[arm] === undefined ? "–" : percent(item.agree[arm]);
      notes.push(` KL ${number(item.kl[arm], 4)}, same top-1 ${agree}`);
      if (answer?.text === seed) notes.push(", the same text as the seed's");
    } else if (item.tokens) notes.push(` KL taken over its ${item.tokens} tokens`);
    let text;
    if (!answer) text = make("p", { class: "note" }, "Not answered (--report-answers).");
    else if (arm === "seed") text = plain(answer.text);
    else text = marked(compare(seed, answer.text)[1], "not in the seed's answer");
    return column(title, notes, text, ink);
  }

  // ---- section 5

  const SHADES = [0.5, 1, 2, 4, 7]; // nats: where the next shade begins, as the legend says
  const shade = (nll) => `n${SHADES.filter((edge) => nll >= edge).length}`;
  const tokensOf = (row) => current.tokens[row.id];

  function showTokens(row) {
    const place = byId("tokens");
    const line = tokensOf(row);
    const rows = current.rows.filter((one) => tokensOf(one));
    const at = rows.indexOf(row);
    const jump = (to, label, sign) => (to === undefined ? null : make("button", {
      type: "button", title: label, "aria-label": label,
      click: () => {
        browsers.row.find(to.id);
        history.replaceState(null, "", address("tokens", to.id));
        (place.querySelector(`[aria-label="${label}"]`) ?? place).focus({ preventScroll: true });
      },
    }, sign));
    const from = current.rows.indexOf(row);
    const before = rows.filter((one) => current.rows.indexOf(one) < from).at(-1);
    const after = rows.find((one) => current.rows.indexOf(one) > from);
    let note = `Token likelihoods were taken of ${rows.length} of ${current.rows.length} rows `
      + "(--report-rows); this one is not among them.";
    if (rows.length === 0) note = "No row has token likelihoods (--report-rows).";
    else if (at >= 0) note = `${at + 1} of ${rows.length} rows with token likelihoods`;
    const head = make("div", { class: "head" },
      make("h3", { dir: "auto" }, row.id), badge(row.status, kind(row)),
      make("span", { class: "notes" }, note),
      make("span", { class: "walk" }, make("a", { href: address("row", row.id) }, "in the data"),
        jump(before, "Previous row with token likelihoods", "←"),
        jump(after, "Next row with token likelihoods", "→")));
    if (!line) {
      place.replaceChildren(head);
      return;
    }
    const arms = line.sdft ? "SFT" : "SFT and SDFT";
    const columns = [tokenColumn(`${arms}: the reference`, line.sft)];
    if (line.sdft) columns.push(tokenColumn("SDFT: the rewrite", line.sdft));
    place.replaceChildren(head, make("div", { class: "columns" }, columns));
  }

  // A training text: `prompt` tokens without loss, then those of the answer with their NLL in nats.
  function tokenColumn(title, { prompt, pieces, nll }) {
    const text = make("div", { class: "text tokens", dir: "auto" });
    pieces.slice(0, prompt).forEach((piece) => {
      text.append(make("span", { class: "token prompt" }, piece));
    });
    const answer = pieces.slice(prompt).map((piece, i) => [piece, nll[i]]);
    answer.forEach(([piece, value]) => {
      const tip = `${number(value)} nats, p = ${Math.exp(-value).toPrecision(2)}`;
      text.append(make("span", { class: `token ${shade(value)}`, title: tip }, piece));
    });
    const mean = nll.reduce((sum, value) => sum + value, 0) / nll.length;
    const notes = [`${nll.length} of ${pieces.length} tokens carry loss, mean `,
      make("b", {}, number(mean)), " nats"];
    const leastLikely = [...answer].sort((a, b) => b[1] - a[1]).slice(0, 6);
    const listed = leastLikely.map(([piece, value], i) => [
      i ? ", " : "",
      make("code", {}, piece.trim() || JSON.stringify(piece)),
      ` ${number(value, 1)}`,
    ]);
    const folded = make("details", {}, make("summary", {}, "As a table"));
    folded.addEventListener("toggle", () => folded.append(tokenTable(answer)), { once: true });
    return column(title, notes,
      [text, make("p", { class: "notes" }, "Least likely: ", listed), folded]);
  }

  function tokenTable(answer) {
    const head = ["Token", "NLL, nats"].map((name) => make("th", { scope: "col" }, name));
    const rows = answer.map(([piece, value]) => make("tr", {},
      make("td", {}, make("code", {}, JSON.stringify(piece))),
      make("td", {}, number(value, 3))));
    return make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, head)),
      make("tbody", {}, rows)));
  }

  // ---- the page

  const several = () => report.runs.length > 1;
  const address = (key, id) => `#${key}=${encodeURIComponent(id)}`
    + (several() ? `&run=${report.runs.indexOf(current) + 1}` : "");
  const tuned = () => current.arms.slice(1); // the arms of the run but for the seed
  let report; // the data of the page: {runs: [{name, arms, rows, answers, tokens}]}, where an arm
  // is [its name in the files, the one that is shown, the name of its colour]
  let current; // the run that is shown
  const browsers = {};

  function show(run) {
    current = run;
    byId("run-select").selectedIndex = report.runs.indexOf(run);
    browsers.row.load(run.rows);
    browsers.answer.load(run.answers);
  }

  // #row=ID, #answer=ID or #tokens=ID, with &run=N where there are several.
  function follow() {
    const found = /^#(row|answer|tokens)=([^&]*)(?:&run=(\d+))?$/.exec(location.hash);
    if (!found) return;
    const run = report.runs[Number(found[3] ?? 1) - 1] ?? current;
    if (run !== current) show(run);
    const browser = browsers[found[1] === "answer" ? "answer" : "row"];
    let id = found[2];
    try {
      id = decodeURIComponent(id);
    } catch { /* not URL-encoded: used as it stands */ }
    if (!browser.find(id)) {
      browser.output.textContent = `There is no ${browser.view.key} “${id}” in this run.`;
    }
    const place = found[1] === "tokens" ? byId("training") : browser.root.parentElement;
    place.scrollIntoView();
    if (found[1] !== "tokens") browser.list.focus({ preventScroll: true });
  }

  function start() {
    report = JSON.parse(byId("report-data").textContent);
    current = report.runs[0];
    byId("run-select").append(...report.runs.map((run, i) =>
      make("option", { value: i + 1 }, run.name)));
    byId("run-choice").hidden = !several();
    byId("run-select").addEventListener("change", (event) =>
      show(report.runs[event.target.selectedIndex]));
    browsers.row = new Browser(byId("rows"), rowsView);
    browsers.answer = new Browser(byId("prompts"), answersView);
    show(current);
    follow();
    window.addEventListener("hashchange", follow);
    document.documentElement.dataset.ready = "yes";
  }

  // In print the tables of the figures are open.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("#result details:not([open])")];
    opened.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));

  requestAnimationFrame(() => setTimeout(start)); // the page is painted before the data are read
})();
