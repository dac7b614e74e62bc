// Brings explorers to life without a kernel: precomputed cases, and masks drawn from a table of rules.
(() => {
  const draw = {
    cases: (data, chosen) => data[Object.values(chosen).join("\t")] ?? "",
    mask: (data, chosen) => {
      const [a, b, layers] = ["n_a", "n_b", "layers"].map((name) => Number(chosen[name]));
      const { A, EOS, B } = data.segments;
      const segment = [...Array(a).fill(A), EOS, ...Array(b).fill(B)];
      const name = segment.map((s, i) => (s === A ? `A${i + 1}` : s === B ? `B${i - a}` : "EOS"));
      const rule = data.rules[chosen.layout];
      const order = (q, k) => Math.sign(k - q);
      const looks = segment.map((q, i) => segment.map((k, j) => rule[`${q}${k}${order(i, j)}`]));
      // Layers until known: 1 looks at it, more knows it through others, 0 never.
      const depth = looks.map((row) => row.map(Number));
      let known = looks.map((row, i) => row.map((seen, j) => seen || i === j));
      for (let n = 2; n <= layers; n++) {
        const next = known.map((row, q) => row.map((_, k) => known[q][k] ||
          looks[q].some((seen, m) => seen && known[m][k])));
        next.forEach((row, q) => row.forEach((now, k) => {
          if (now && q !== k && !depth[q][k]) depth[q][k] = n;
        }));
        known = next;
      }
      const words = (q, k) => depth[q][k] === 1 ? `${name[q]} looks at ${name[k]}`
        : depth[q][k] ? `${name[q]} knows ${name[k]} through others after ${depth[q][k]} layers`
        : `${name[q]} cannot know ${name[k]} within ${layers} layer${layers > 1 ? "s" : ""}`;
      const cell = 15, left = 34, side = left + cell * name.length + 2;
      const grid = (title, most) => `<figure style="margin:0 24px 8px 0;display:inline-block">` +
        `<svg role="img" aria-label="${title}" viewBox="0 0 ${side} ${side}" width="${side}" height="${side}" ` +
        `font-size="9" font-family="sans-serif">` +
        name.map((label, i) => {
          const at = left + i * cell + cell * 0.7;
          return `<text x="${left - 4}" y="${at}" text-anchor="end" fill="currentColor">${label}</text>` +
            `<text transform="translate(${at},${left - 4}) rotate(-90)" fill="currentColor">${label}</text>`;
        }).join("") +
        depth.map((row, q) => row.map((n, k) => `<rect x="${left + k * cell}" y="${left + q * cell}" ` +
          `width="${cell - 1}" height="${cell - 1}" fill="${data.colours[n && n <= most ? Math.min(n, 2) : 0]}">` +
          `<title>${words(q, k)}</title></rect>`).join("")).join("") +
        `</svg><figcaption>${title}</figcaption></figure>`;
      const pairs = looks.flat().filter(Boolean).length, all = name.length ** 2;
      return grid("rows look at columns", 1) + grid(`after ${layers} layer${layers > 1 ? "s" : ""}`, layers) +
        `<p aria-live="polite"><b>${words(a + 1, 0)}.</b> ${words(0, a + 1)}. One layer computes ${pairs} of ` +
        `${all} pairs, ${Math.round(100 * pairs / all)} %. Blue: looks at it; orange: knows it through others.</p>`;
    },
  };
  const start = () => document.querySelectorAll(".cocoa-explorer:not([data-live])").forEach((box) => {
    box.dataset.live = "yes";
    const data = JSON.parse(box.querySelector("script").textContent);
    const controls = [...box.querySelectorAll("[data-name]")];
    const update = () => {
      const chosen = Object.fromEntries(controls.map((control) => [control.dataset.name, control.value]));
      controls.forEach((control) => {
        if (control.type === "range") control.nextElementSibling.textContent = control.value;
      });
      box.querySelector(".answer").innerHTML = draw[box.dataset.kind](data, chosen);
    };
    controls.forEach((control) => control.addEventListener("input", update));
    box.querySelector(".menus").hidden = false;
    update();
  });
  start();
  document.addEventListener("DOMContentLoaded", start);
})();
