
"use strict";
(() => {
  const PAGE = 25; // pairs
  const MORE = [86, 180, 233]; // colours of Okabe and Ito; black text is legible on both
  const LESS = [230, 159, 0];
  const byId = (id) => document.getElementById(id);
  const { rows, bases } = JSON.parse(byId("data").textContent);
  const state = { base: bases[0], sort: "number", descending: false, query: "", scale: "auto", page: 0 };
  const text = rows.map((row) =>
    [row.prompt, row.chosen.tokens.join(""), row.rejected.tokens.join("")].join("\n").toLowerCase());

  // --- numbers -------------------------------------------------------------------------------------------------------

  const sum = (values) => values.reduce((total, value) => total + value, 0);

  /** What is shown of one completion against a base, "reference" or "start". */
  function measure(side, base) {
    const d = side.policy.map((logp, i) => logp - side[base][i]);
    const n = Math.max(1, d.length);
    return {
      d,
      policy: sum(side.policy),
      base: sum(side[base]),
      ratio: sum(d),
      moved: sum(d.map(Math.abs)),
      mean: sum(d) / n,
      kl: sum(d.map((x) => Math.exp(-x) - 1 + x)) / n,
    };
  }

  const measured = {}; // base -> one entry a row
  function numbers(base) {
    measured[base] ??= rows.map((row, i) => {
      const chosen = measure(row.chosen, base);
      const rejected = measure(row.rejected, base);
      const length = chosen.d.length + rejected.d.length;
      return {
        number: i + 1, chosen, rejected, length,
        margin: row.beta * (chosen.ratio - rejected.ratio),
        change: (chosen.moved + rejected.moved) / Math.max(1, length),
      };
    });
    return measured[base];
  }

  const automatic = {}; // base -> the 95th percentile of |difference|, two digits
  function scale() {
    if (state.scale !== "auto") return Number(state.scale);
    automatic[state.base] ??= (() => {
      const sizes = Float64Array.from(
        numbers(state.base).flatMap((row) => [...row.chosen.d, ...row.rejected.d]), Math.abs).sort();
      return Number((sizes[Math.floor(0.95 * (sizes.length - 1))] || 1).toPrecision(2));
    })();
    return automatic[state.base];
  }

  /** Rows that the search finds, in order: indices. */
  function selected() {
    const query = state.query.toLowerCase();
    const of = numbers(state.base);
    const sign = state.descending ? -1 : 1;
    const found = [...rows.keys()].filter((i) => text[i].includes(query));
    return found.sort((a, b) => sign * (of[a][state.sort] - of[b][state.sort]) || a - b);
  }

  // --- elements ------------------------------------------------------------------------------------------------------

  /** Text of the data goes in as text only. */
  function element(name, className, content, ...children) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (content !== undefined && content !== null) made.textContent = content;
    made.append(...children);
    return made;
  }

  const signed = (value, digits = 3) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const shown = (token) => (token === "" ? "▫" : token.replaceAll("\n", "↵\n"));

  function colour(d, full) {
    const share = Math.min(1, Math.abs(d) / full);
    const end = d > 0 ? MORE : LESS;
    return `rgb(${end.map((channel) => Math.round(255 + (channel - 255) * share)).join(", ")})`;
  }

  function sideOf(row, name, numbersOfRow) {
    const side = row[name];
    const of = numbersOfRow[name];
    const full = scale();
    const spans = side.tokens.map((token, i) => {
      const span = element("span", of.d[i] < -full / 4 ? "less" : "", shown(token));
      span.style.backgroundColor = colour(of.d[i], full);
      return span;
    });
    const tokens = element("div", "tokens", null, ...spans);
    tokens.tabIndex = 0;
    tokens.setAttribute("role", "group");
    tokens.setAttribute("aria-label", `${name} completion of pair ${numbersOfRow.number}: arrow keys go through its tokens`);
    tokens.tokens = { side, d: of.d }; // for the tip
    const line = `${side.tokens.length} tokens · log p: policy ${signed(of.policy, 2)}, ${state.base} ` +
      `${signed(of.base, 2)} · reward ${signed(row.beta * of.ratio)} · per token ${signed(of.mean)}, ` +
      `KL (k3) ${of.kl.toFixed(3)}`;
    const title = name === "chosen" ? "Chosen" : "Rejected";
    return element("section", name, null, element("h3", "", title), element("p", "numbers", line), tokens);
  }

  function pairOf(i) {
    const row = rows[i];
    const of = numbers(state.base)[i];
    const line = `reward margin ${signed(of.margin)} · change ${of.change.toFixed(3)} nats per token · β ${row.beta}`;
    const header = element("header", "", null, element("h2", "", `Pair ${of.number}`), element("span", "numbers", line));
    const prompt = element("details", "", null, element("summary", "", "Prompt"), element("div", "prompt", row.prompt));
    prompt.open = true;
    const sides = element("div", "sides", null, sideOf(row, "chosen", of), sideOf(row, "rejected", of));
    return element("article", "pair", null, header, prompt, sides);
  }

  function show() {
    const found = selected();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    hideTip();
    byId("pairs").replaceChildren(...found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(pairOf));
    byId("page").value = state.page + 1;
    byId("page").max = pages;
    byId("pages").textContent = pages;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
    byId("count").textContent =
      found.length === rows.length ? `${rows.length} pairs` : `${found.length} of ${rows.length} pairs`;
    byId("least").textContent = `${signed(-scale(), 2)}: less likely than under the ${state.base}`;
    byId("most").textContent = `${signed(scale(), 2)}: more likely`;
  }

  function turn(page) {
    state.page = page;
    show();
    window.scrollTo(0, 0);
  }

  // --- the tip of a token --------------------------------------------------------------------------------------------

  const tip = byId("tip");
  let current = null;

  function hideTip() {
    current?.classList.remove("current");
    current = null;
    tip.hidden = true;
  }

  function showTip(span) {
    hideTip();
    current = span;
    span.classList.add("current");
    const { side, d } = span.parentElement.tokens;
    const i = [...span.parentElement.children].indexOf(span);
    const logps = ["policy", "reference", "start"].filter((name) => side[name])
      .map((name) => `log p ${name} ${signed(side[name][i])}`);
    tip.textContent = [`token ${i + 1}: ${JSON.stringify(side.tokens[i])}`, ...logps,
      `policy − ${state.base} ${signed(d[i])}`].join("\n");
    tip.hidden = false;
    const box = span.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
    const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight;
    tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + window.scrollY}px`;
  }

  const tokenAt = (target) => target.closest?.(".tokens > span");
  const list = byId("pairs");
  list.addEventListener("pointerover", (event) => {
    const span = tokenAt(event.target);
    if (span) showTip(span);
    else if (!event.target.closest(".tokens")) hideTip();
  });
  list.addEventListener("pointerleave", hideTip);
  list.addEventListener("focusout", hideTip);
  list.addEventListener("keydown", (event) => {
    const tokens = event.target.closest(".tokens");
    if (!tokens || event.ctrlKey || event.metaKey || event.altKey) return;
    const spans = tokens.children;
    const at = current?.parentElement === tokens ? [...spans].indexOf(current) : -1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (to === undefined || !spans.length) return;
    event.preventDefault();
    const span = spans[Math.min(Math.max(0, to), spans.length - 1)];
    span.scrollIntoView({ block: "nearest" });
    showTip(span);
  });

  // --- controls ------------------------------------------------------------------------------------------------------

  byId("base").append(...bases.map((base) => element("option", "", base)));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", () => {
    for (const name of ["base", "sort", "query", "scale"]) state[name] = byId(name).value;
    state.descending = byId("descending").checked;
    state.page = 0;
    show();
  });
  byId("previous").addEventListener("click", () => turn(state.page - 1));
  byId("next").addEventListener("click", () => turn(state.page + 1));
  byId("page").addEventListener("change", () => turn((Number(byId("page").value) || 1) - 1));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches?.("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { "/": () => byId("query").focus(), n: () => turn(state.page + 1), p: () => turn(state.page - 1) }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  show();
})();
