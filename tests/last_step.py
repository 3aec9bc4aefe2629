"""The last step to clean data by a line through two predictions, on top of any transcription."""

from __future__ import annotations


def with_line(oracle):
    """An oracle whose last step returns x0, ended at second order instead.

    D = x0 + c q + O(q^2) along the flow, q = (sigma/alpha)^2, so with the nearest D_far of at least
    three times the q, x0 = D - (D_far - D) q/(q_far - q).
    """

    def run(p, x):
        seen, predict = [], p.predict

        def recorded(x_in, t, alpha, sigma):
            found = predict(x_in, t, alpha, sigma)
            seen.append((alpha, sigma, found[0]))
            return found

        p.predict = recorded
        try:
            states = oracle(p, x)
        finally:
            p.predict = predict
        if p.sigmas[-1] > 0 or p.steps == 1:
            return states
        alpha, sigma, newest = seen[-1]
        q = sigma**2 / alpha**2
        far = [(s**2 / a**2, d) for a, s, d in seen[:-1] if a > 0 and s**2 / a**2 >= 3 * q]
        if far:
            q_far, d_far = far[-1]
            states[-1] = p.alphas[-1] * (newest - (d_far - newest) * q / (q_far - q))
        return states

    return run
