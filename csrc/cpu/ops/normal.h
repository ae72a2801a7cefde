// The normal distribution, which GELU is made of: P(X > |x|) and the density at x.
#pragma once
#include "../simd/vec.h"

namespace {

struct Normal {
    vf tail, density;  // P(X > |x|), below 7e-8 from the truth; the density times x, below 2e-7
};

#if defined(__AVX512F__)

// A polynomial in u, -0.5 .. 0.5, around each |x| = 0.4 i, the highest power first; nothing is left from 5.8 on. They
// interpolate the density at Chebyshev's points and are summed up from the tail at u = 0. A table of sixteen is
// one register, so looking up costs what an addition costs, and exp is not needed.
alignas(64) constexpr float TAIL[7][16] = {
    {0, 1.11452418e-05f, 1.17918553e-05f, 3.55469979e-06f, -4.02372825e-06f, -5.49099195e-06f,
     -2.88341585e-06f, -2.60150017e-07f, 7.47877777e-07f, 6.66997721e-07f, 3.39308826e-07f, 1.23670816e-07f,
     3.46475808e-08f, 7.70810260e-09f, 1.38688416e-09f, 0},
    {-1.01113656e-04f, -6.44010142e-05f, 1.02515169e-05f, 5.83824331e-05f, 5.46058254e-05f, 2.31356698e-05f,
     -2.85412580e-06f, -1.16319734e-05f, -9.42119732e-06f, -4.88990008e-06f, -1.88340152e-06f, -5.67529639e-07f,
     -1.37324150e-07f, -2.70884790e-08f, -4.39867742e-09f, 0},
    {0, -4.46230377e-04f, -5.83388028e-04f, -3.87752167e-04f, -8.33028025e-05f, 1.15175433e-04f,
     1.58231123e-04f, 1.14423827e-04f, 5.89182382e-05f, 2.34032887e-05f, 7.42293832e-06f, 1.91499157e-06f,
     4.06374227e-07f, 7.14620967e-08f, 1.04682369e-08f, 0},
    {4.25522588e-03f, 3.29962047e-03f, 1.11247611e-03f, -9.11268347e-04f, -1.84566749e-03f, -1.72772643e-03f,
     -1.13708200e-03f, -5.77532919e-04f, -2.34979205e-04f, -7.80587361e-05f, -2.14094143e-05f, -4.88307160e-06f,
     -9.30711735e-07f, -1.48763263e-07f, -1.99924610e-08f, 0},
    {0, 1.17846439e-02f, 1.85402595e-02f, 1.86418612e-02f, 1.41978674e-02f, 8.63855518e-03f,
     4.29974962e-03f, 1.77306111e-03f, 6.10326533e-04f, 1.76227753e-04f, 4.28256790e-05f, 8.77975435e-06f,
     1.52114092e-06f, 2.23019711e-07f, 2.76982881e-08f, 0},
    {-1.59576908e-01f, -1.47308052e-01f, -1.15876622e-01f, -7.76744261e-02f, -4.43683378e-02f, -2.15963852e-02f,
     -8.95781070e-03f, -3.16617964e-03f, -9.53635143e-04f, -2.44760915e-04f, -5.35322324e-05f, -9.97705774e-06f,
     -1.58454316e-06f, -2.14447454e-07f, -2.47317047e-08f, 0},
    {5.00000000e-01f, 3.44578266e-01f, 2.11855397e-01f, 1.15069672e-01f, 5.47992922e-02f, 2.27501318e-02f,
     8.19753576e-03f, 2.55513028e-03f, 6.87137945e-04f, 1.59108589e-04f, 3.16712431e-05f, 5.41254394e-06f,
     7.93328127e-07f, 9.96442608e-08f, 1.07175904e-08f, 0},
};

inline Normal normal(vf x) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the lowest bits then hold
    // (A NaN becomes 15: whoever multiplies by x, as both GELU and its slope do, has it back.)
    const vf steps = min(max(x, -x) * 2.5f, all(15.0f)), shifted = steps + magic, u = steps - (shifted - magic);
    const auto power = [&](int k) {
        return (vf)_mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(TAIL[k]));
    };
    vf tail = power(0), slope = all(0);  // by Horner's rule, the derivative beside the value
    for (int k = 1; k < 7; k++) slope = slope * u + tail, tail = tail * u + power(k);
    return {tail, slope * -2.5f};
}

#else

// The tail over the bell e^(-x^2 / 2), Mills' ratio, is a polynomial of ours.
inline Normal normal(vf x) {
    const vf a = min(max(x, -x), all(5.5f)), bell = exp(-0.5f * x * x);
    vf ratio = all(1.631720624e-06f);
    for (float c : {-3.520834492e-05f, 3.397427622e-04f, -1.974645624e-03f, 7.939437004e-03f, -2.431400313e-02f,
                    6.115495721e-02f, -1.325138389e-01f, 2.499168060e-01f, -3.989365166e-01f, 4.999999342e-01f})
        ratio = ratio * a + c;
    return {bell * ratio, bell * 0.39894228f};
}

#endif

}  // namespace
